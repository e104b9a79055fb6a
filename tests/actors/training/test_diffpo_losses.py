"""Both losses: what the formula says, in float64 and position by position; their gradients; and who gets none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from actors.contract import ConfigError
from actors.training import diffpo_losses as losses
from actors.training.diffpo_losses import DiffPOLoss, autoregressive, consistency
from actors.training.trajectories import Trajectory, batch

CPU = torch.device("cpu")
OMEGA = 3.0
END = 2


def trajectory(prompt: list[int], *states: list[int]) -> Trajectory:
    ids = tuple(np.array(state, np.int32) for state in states)
    return Trajectory((("user", "x"),), np.array(prompt, np.int32), ids, ("",) * len(states))


SOME = [
    (trajectory([5, 6, 7], [20, 21, 40, 41, 2], [20, 21, 30, 31, 32, 33, 2]), 0),  # differ from the third on
    (trajectory([8, 9, 10, 11, 12], [50, 51, 52, 53, 54, 55, 56, 2], [60, 61, 2]), 0),  # the best is the shorter one
    (trajectory([13], [70, 71, 2], [70, 71, 2]), 0),  # one and the same
    (trajectory([14, 15], [80, 90, 91, 2], [80, 81, 82, 2], [80, 85, 86, 87, 2]), 1),
]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> PreTrainedModel:
    """In float64; Gemma caps its logits."""
    torch.set_num_threads(1)
    folder = model_folder(request.param)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    return loaded.eval()


def log_q(model: PreTrainedModel, prompt: np.ndarray, before: np.ndarray) -> Tensor:
    """log q(· | x, before), float64 [vocabulary], by the model's own forward on these tokens alone."""
    ids = torch.tensor([[*prompt.tolist(), *before.tolist()]])
    return model(input_ids=ids, use_cache=False).logits[0, -1].double().log_softmax(-1)


def by_the_formula(model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> tuple[Tensor, Tensor]:
    """(Σ L_AR, Σ L_Con) over SOME, written as the equation is: all i of y(T), those before the first difference too."""
    ar, con = torch.zeros(2, dtype=torch.float64)
    for each, t in SOME:
        best = each.states[-1]
        other = np.append(each.states[t], [END] * len(best))  # as a draft is filled up for the decoder
        for i in range(len(best)):
            ar = ar - log_q(model, each.prompt, best[:i])[int(best[i])]
        for i in range(len(best)):
            fixed = log_q(teacher or model, each.prompt, best[:i]).detach()
            con = con + (fixed.exp() * (fixed - log_q(model, each.prompt, other[:i]))).sum()
    return ar, con


def test_both_losses_are_the_formula_s(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = by_the_formula(model)
    assert wanted[1] > 1
    for logits_at_once in (1 << 24, 3 * model.config.vocab_size):  # all of them in one chunk; three positions in each
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", logits_at_once)
        found = DiffPOLoss(model)(batch(SOME, consistent=True, device=CPU))
        torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-5, atol=1e-5)


def test_float32_comes_close_to_the_formula_in_float64(model_folder: Callable[[str], Path]) -> None:
    exact = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float64)
    single = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    found = DiffPOLoss(single)(batch(SOME, consistent=True, device=CPU))
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(by_the_formula(exact)), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_finite_differences_with_the_teacher_held(
    model: PreTrainedModel, model_folder: Callable[[str], Path]
) -> None:
    """Along the gradient itself: there its length is the derivative, and no part of it can be missing."""
    teacher = AutoModelForCausalLM.from_pretrained(
        model.name_or_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()

    def value(teacher: PreTrainedModel | None) -> float:
        ar, con = by_the_formula(model, teacher)
        return float(ar + OMEGA * con)

    model.zero_grad()
    ar, con = DiffPOLoss(model)(batch(SOME, consistent=True, device=CPU))
    (ar + OMEGA * con).backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    length = torch.sqrt(sum((each**2).sum() for each in gradients.values()))  # type: ignore[arg-type]
    parameters, step = dict(model.named_parameters()), 5e-4

    def move(by: float) -> None:
        with torch.no_grad():
            for name, each in gradients.items():
                parameters[name].add_(each / length, alpha=by)

    with torch.no_grad():
        values = {}
        for held in (teacher, None):
            move(step)
            above = value(held)
            move(-2 * step)
            below = value(held)
            move(step)
            values[held is None] = (above - below) / (2 * step)
    assert values[False] == pytest.approx(float(length), rel=1e-3)
    assert values[True] != pytest.approx(float(length), rel=1e-2)  # with a teacher that moves it is another function


def test_no_gradient_flows_through_the_teacher() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 9, dtype=torch.float64)
    teacher = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    consistency(head, teacher, student, rows_at_once=2).backward()
    assert teacher.grad is None
    assert student.grad is not None and student.grad.abs().max() > 0
    # Of the head's gradient only the student's part is there: q - q⁻, times the state.
    with torch.no_grad():
        q, fixed = head(student).softmax(-1), head(teacher).softmax(-1)
        torch.testing.assert_close(head.weight.grad, (q - fixed).T @ student)


def test_small_losses_by_finite_differences() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(3, 7, dtype=torch.float64)
    targets = torch.tensor([1, 6, 3])
    hidden = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    fixed = torch.randn(3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda hidden: autoregressive(head, hidden, targets, 2), hidden)
    assert torch.autograd.gradcheck(lambda hidden: consistency(head, fixed, hidden, 2), hidden)


def test_nothing_but_the_sum_of_a_chunk_is_kept_for_the_backward_pass() -> None:
    """That is what bounds memory: of n positions no more logits are held than of one chunk."""
    head = torch.nn.Linear(8, 1000)
    hidden = torch.randn(64, 8, requires_grad=True)
    held: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        consistency(head, torch.randn(64, 8), hidden, rows_at_once=4)
    assert max(held, default=0) < 4 * 1000


def test_a_model_whose_logits_are_scaled_otherwise_is_refused(model_folder: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("gemma2"), dtype=torch.float32)
    model.config.final_logit_softcapping, forward = None, model.forward

    def scaled(**inputs: object) -> object:
        out = forward(**inputs)
        out.logits = out.logits / 3
        return out

    model.forward = scaled
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM cannot be trained here: its logits are more than"):
        DiffPOLoss(model)
