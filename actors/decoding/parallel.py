"""What a row guesses of its next tokens, and what it learns when the model has seen the guesses.

A forward runs a row's last token and some guesses behind it, and predicts what follows each of them. The first
prediction follows what is certain, so it is the next token; the second is the one after that if the first guess was
right; and so on, as long as the guesses are. That is greedy decoding, token for token, however the guesses came about,
and every forward makes at least one.

`Drafter` decodes up to the fixed point. Its guesses come from the draft, and from the model itself: what a forward
predicted behind the first wrong guess, which is Jacobi's iteration. `Denoiser` is DiffPO's finite number of iterations,
where the predictions replace the guesses whether they stand or not.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

DEPTH = 4
"""Right guesses in a row beyond which one more says nothing new about the next."""
START = -1
"""In place of a run: before the first guess."""
NEAR = 4  # tokens; as far from where it was expected, one token that agrees is a sign, two are anywhere
LONGEST = 16  # tokens; two places in a draft that agree with the text so far as this are told apart by distance
PRIOR = [0.2, 0.5, 0.7, 0.8, 0.9, 0.5]  # chance by run: 0 to DEPTH, START
PRIOR_WEIGHT = 4.0  # guesses
KEPT = 0.9
"""What is left of a record's past at each note: about the last ten count, as the next drafts may be poor ones."""
BEHIND_WRONG = 0.5
"""What a guess behind a wrong one is worth of its chance. A step without it tells, at no price, whether the draft goes
on again; then the next step can have the rest of it on better terms."""


class Record:
    """How often a source of guesses was right of late, by its run: how many before were right one after the other.

    A row's record begins with what its parent knows, the record of all rows of the loop.
    """

    def __init__(self, parent: "Record | None" = None) -> None:
        self.parent = parent
        self.num_tried = [0.0] * len(PRIOR)
        self.num_right = [0.0] * len(PRIOR)
        self._known: list[float] | None = None  # chances, until a note changes them

    def note(self, run: int, right: bool) -> None:
        self.num_tried[run] = KEPT * self.num_tried[run] + 1
        self.num_right[run] = KEPT * self.num_right[run] + right
        self._known = None
        if self.parent is not None:
            self.parent.note(run, right)

    def survival(self, run: int, count: int) -> np.ndarray:
        """float64 [count]: the chances that the first 1, 2, … of `count` guesses after this run are all right."""
        chances = self._chances()
        first = [chances[run], *chances[max(run, 0) + 1 : DEPTH]][:count]
        survival = np.full(count, chances[DEPTH])
        survival[: len(first)] = first
        return survival.cumprod(out=survival)

    def _chances(self) -> list[float]:
        if self._known is not None and self.parent is None:  # what all rows ask for, between two steps of theirs
            return self._known
        prior = PRIOR if self.parent is None else self.parent._chances()
        self._known = [
            (right + PRIOR_WEIGHT * chance) / (tried + PRIOR_WEIGHT)
            for right, tried, chance in zip(self.num_right, self.num_tried, prior, strict=True)
        ]
        return self._known


class Guesser(Protocol):
    @property
    def num_left(self) -> int:
        """How many tokens are probably still to come, at least 1."""
        ...

    def offer(self, most: int) -> tuple[list[int], np.ndarray]:
        """At most so many guesses, and what each is worth in tokens: in essence the chance (float64) that it and all
        before it are right."""
        ...

    def learn(self, predictions: list[int], num_right: int) -> list[int]:
        """Take in what the model predicted behind the last token and each guess of which `num_right` were right.

        Returns:
            The tokens that this adds to the row.
        """
        ...


class Drafter:
    """Guesses for one row that is decoded up to the fixed point.

    `at` is where in the draft the next token is expected, `run` how many tokens before it agree with the text. A token
    that is not the expected one counts as a substitution, until the end of the text is found elsewhere in the draft:
    then something was inserted or left out, and the draft goes on from there.

    That a token is checked against every source costs nothing, so sources that are not used are watched all the same.

    Args:
        draft: tokens; the first `num_reserved` are part of the text already.
        drafts: record of all drafts of the loop.
        predictions: record of all predictions that became guesses.
    """

    def __init__(self, draft: Sequence[int], num_reserved: int, drafts: Record, predictions: Record) -> None:
        self.draft = list(draft)
        self.text = self.draft[:num_reserved]
        self.at = num_reserved
        self.run = min(num_reserved, DEPTH) or START
        self.predicted: list[int] = []
        self._drafts = Record(drafts)
        self._predictions = Record(predictions)
        self._places: defaultdict[int, list[int]] = defaultdict(list)
        for place, token in enumerate(self.draft, 1):
            self._places[token].append(place)

    @property
    def num_left(self) -> int:
        return max(1, len(self.draft) - self.at)

    def offer(self, most: int) -> tuple[list[int], np.ndarray]:
        """The draft from `at`, or the model's predictions and behind them the draft, whichever promises more."""
        tokens = self.draft[self.at : self.at + most]
        chances = self._drafts.survival(self.run, len(tokens))
        own = self.predicted[:most]
        if own:
            rest = self.draft[self.at + len(own) : self.at + most]
            survival = self._predictions.survival(0, len(own))
            survival = np.append(survival, survival[-1] * self._drafts.survival(0, len(rest)))
            if survival.sum() > chances.sum():
                return own + rest, BEHIND_WRONG * survival
        return tokens, chances if self.run else BEHIND_WRONG * chances

    def learn(self, predictions: list[int], num_right: int) -> list[int]:
        made = predictions[: num_right + 1]
        for run, (guess, token) in enumerate(zip(self.predicted, made, strict=False)):
            self._predictions.note(min(run, DEPTH), guess == token)
            if guess != token:
                break
        self.predicted = predictions[num_right + 1 :]
        for token in made:
            self._follow(token)
        return made

    def _follow(self, token: int) -> None:
        self.text.append(token)
        right = False
        if self.at < len(self.draft):
            right = self.draft[self.at] == token
            self._drafts.note(self.run, right)
        self.at += 1
        if right:
            self.run = min(max(self.run, 0) + 1, DEPTH)
        else:
            self.run = 0
            self._align()

    def _align(self) -> None:
        """Go to where the draft agrees with the longest end of the text, of several such places to the nearest. What
        agrees in one token alone must be near."""
        best = 0, 0, self.at
        for place in self._places.get(self.text[-1], ()):
            agreement, distance = self._agreement(place), abs(place - self.at)
            if agreement > 1 or distance <= NEAR:
                best = max(best, (agreement, -distance, place))
        self.run, self.at = min(best[0], DEPTH), best[2]

    def _agreement(self, place: int) -> int:
        """How many tokens before this place of the draft are the text's last ones."""
        most = min(LONGEST, place, len(self.text))
        return next((n for n in range(most) if self.draft[place - 1 - n] != self.text[-1 - n]), most)


class Denoiser:
    """The last guess of one row's response, behind the tokens that cannot change any more.

    An iteration replaces every token by what the model predicts from those before it. Up to the first that changes, and
    with it, they will be predicted again and again: these are the row's, and their K and V are never made again.

    Args:
        guess: the whole response but for its reserved tokens; at least one token.
        num_iterations: at least 1.
    """

    def __init__(self, guess: list[int], num_iterations: int) -> None:
        self.guess = guess
        self.num_iterations = num_iterations

    @property
    def num_left(self) -> int:
        return len(self.guess)

    def offer(self, most: int) -> tuple[list[int], np.ndarray]:
        return self.guess[:-1], np.ones(len(self.guess) - 1)  # what the last one predicts lies outside

    def learn(self, predictions: list[int], num_right: int) -> list[int]:
        self.num_iterations -= 1
        num_certain = num_right + 1 if self.num_iterations else len(predictions)
        self.guess = predictions[num_certain:]
        return predictions[:num_certain]
