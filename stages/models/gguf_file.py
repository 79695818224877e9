"""Models in GGUF files, the format of llama.cpp.

A file is unpacked once into a folder that transformers opens like any other: its weights are
dequantised to fp32, and its tokenizer, chat template and end tokens are rebuilt. The folder is kept
in the cache and is named after the content of the file.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import file_sha256, whole_folder, write_errors, write_json
from ...data.places.cache import CacheSettings
from ...data.places.claims import claimed
from ..libraries import asking
from ..report import Report, Reporter, silent
from .model_files import UNPACKED_RECORD

if TYPE_CHECKING:
    from pathlib import Path

GGUF = ".gguf"
"""Ends the name of a GGUF file."""

_GPT2_RULE = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "granite-docling")
_DIGITS_RULE = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Names of rules for splitting text that transformers does not know, so that it splits as GPT-2
does. That is right for the first names; the others also make every digit a token.
(llama.cpp, src/llama-vocab.cpp)"""
_SPACE = "\u2581"
"""Stands for a space in tokenizers whose pieces have scores."""
_TESTED = ("llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3")
"""Architectures that tests write, unpack and compare with the original; Mistral is a `llama`."""
_GEMMA_27B = (46, 62)
"""Layers of Gemma 2 and Gemma 3 with 27 billion parameters, whose queries are scaled by the hidden
size per head and not by the width of a head (llama.cpp, src/models)."""
_SHOWN_BY_TENSORS = ("vocab_size", "context_length", "feed_forward_length")
"""Settings whose faults the shapes of the tensors would show, and one that `_complete` sets."""
_SETTINGS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Setting of a file -> attribute of a configuration, for some that transformers ignores."""


@functools.cache
def _content(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, computed once for each size and time of change."""
    return file_sha256(path)


def unpacked(path: Path, where: str, report: Reporter = silent) -> Path:
    """The folder into which a GGUF file is unpacked; it is made if it does not exist.

    The folder is called `SHA/NAME` in the cache (`$COLDSTILL_CACHE`, or `~/.cache/coldstill`). It
    takes 4 bytes a parameter, and may be deleted at any time.

    where  the recipe's key, for messages

    Raises
        ColdstillError: the file is damaged, transformers cannot open it, its tokenizer cannot be
            rebuilt as llama.cpp splits text, or the disk is full
    """
    if not path.is_file():
        raise ColdstillError(f"{where}: no file {path}")
    if importlib.util.find_spec("gguf") is None:
        raise ColdstillError(f"{where}: a GGUF file needs gguf: pip install 'coldstill[gguf]'")
    state = path.stat()
    digest = _content(path, state.st_size, state.st_mtime_ns)
    folder = CacheSettings().place / "gguf" / digest[:16] / path.stem
    if folder.is_dir():
        return folder
    with claimed(folder.parent / "unpacking", wait=True):
        if not folder.is_dir():
            _unpack(path, digest, folder, where, report)
    return folder


def _unpack(path: Path, digest: str, folder: Path, where: str, report: Reporter) -> None:
    from .ends import repair_generation
    from .loading import gguf_config, load_gguf

    kinds, parameters = _tensors(path, where)
    config = gguf_config(path, where)
    _complete(config, path, where)
    needed, free = 4 * parameters, shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise ColdstillError(
            f"{where}: {path.name} has {parameters:,} parameters, which take {needed:,} bytes when "
            f"dequantised to fp32; {free:,} are free in {folder.parent}"
        )
    report(
        Report(
            stage="unpack",
            note=f"{path.name}: {parameters:,} parameters are dequantised to fp32, once, into "
            f"{folder}",
        )
    )
    report(Report(stage="unpack", doing=f"read {path.name}"))
    tokenizer = _tokenizer(path, where)
    model = load_gguf(path, config, where)
    if note := repair_generation(model):
        report(Report(stage="unpack", note=f"{path.name}: {note}"))
    listed = ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())
    with write_errors(folder), whole_folder(folder) as scratch:
        with asking("transformers", "save the unpacked model", where=where):
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        record = {
            "file": path.name,
            "sha256": digest,
            "weights": f"GGUF: {listed} tensors; dequantised to fp32",
        }
        write_json(scratch / UNPACKED_RECORD, record)


def _tensors(path: Path, where: str) -> tuple[Counter[str], int]:
    """The number of tensors of each type, and the number of all parameters.

    Raises
        ColdstillError: it is not a GGUF file, or it ends before its last tensor
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ColdstillError(f"{where}: {path} is not a GGUF file: it begins otherwise")
    with asking("transformers", f"read {path.name} as a GGUF file", where=where):
        from transformers.integrations.gguf import GgufHeader
        from transformers.integrations.gguf.dequant import GGML_NAME

        try:
            header = GgufHeader.from_file(str(path))
        except struct.error as error:
            raise ColdstillError(
                f"{where}: {path} ends within its header; copy or download it again"
            ) from error
    end = max((one.offset + one.nbytes for one in header.tensors), default=0) + header.data_start
    size = path.stat().st_size
    if size < end:
        raise ColdstillError(
            f"{where}: {path} ends after {size:,} bytes, its tensors need {end:,}; copy or "
            "download it again"
        )
    plain = {0: "F32", 1: "F16", 30: "BF16"}
    kinds = Counter(
        plain.get(one.ggml_type) or str(GGML_NAME[one.ggml_type]) for one in header.tensors
    )
    return kinds, sum(math.prod(one.shape) for one in header.tensors)


def _complete(config: Any, path: Path, where: str) -> None:
    """Add the settings of a file that transformers ignores to the configuration that it has read.

    Raises
        ColdstillError: a setting or tensor changes the model's output in a way that is not known
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf import read_gguf_metadata

    settings, tensors = read_gguf_metadata(str(path))
    architecture = settings["general.architecture"]
    if architecture not in _TESTED:
        raise ColdstillError(
            f"{where}: {path.name} holds a {architecture!r} model; GGUF files of these are read: "
            f"{', '.join(_TESTED)}; for others use a folder with the original model"
        )
    mapping = GGUF_CONFIG_MAPPING.get(config.model_type, GGUF_CONFIG_MAPPING.get(architecture, {}))
    ignored = {
        name: value
        for key, value in settings.items()
        if (name := key.removeprefix(f"{architecture}.")) != key
        and mapping.get(name) is None
        and name not in _SHOWN_BY_TENSORS
        and value not in (0, "", "none")
    }
    for name, attribute in _SETTINGS.items():
        if name in ignored and hasattr(config, attribute):
            setattr(config, attribute, ignored.pop(name))
    config.max_position_embeddings = settings[f"{architecture}.context_length"]
    if isinstance(ignored.get("attention.sliding_window_pattern"), list):
        windows = ignored.pop("attention.sliding_window_pattern")
        kinds = ("full_attention", "sliding_attention")
        config.layer_types = [kinds[bool(has_window)] for has_window in windows]
    if (base := ignored.pop("rope.freq_base_swa", None)) is not None:
        config.rope_parameters["sliding_attention"]["rope_theta"] = base
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if ignored.get(name) == width:
            del ignored[name]
    if hasattr(config, "query_pre_attn_scalar"):  # no setting of a file: llama.cpp infers it
        is_largest = config.num_hidden_layers in _GEMMA_27B
        heads = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = heads if is_largest else width
    if "rope_freqs.weight" in tensors:
        ignored["rope_freqs.weight"] = "a tensor"
    for name, value in ignored.items():
        raise ColdstillError(
            f"{where}: {path.name} has {name} = {value!r}, which transformers ignores, so its "
            "model would not be the file's; use a folder with the original model"
        )


def _tokenizer(path: Path, where: str) -> Any:
    """The tokenizer of a file, which splits text before merging by the rule that the file names.

    transformers leaves the rule of GPT-2 in place for every name that it does not know, so that
    numbers become tokens that the model has never seen. It also makes a tokenizer of the class
    that is usual for the model, which replaces the rule when it is loaded again.

    Raises
        ColdstillError: the name of the rule is unknown here too
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import read_gguf_metadata

    from .loading import gguf_tokenizer

    read = gguf_tokenizer(path, where)
    settings, _ = read_gguf_metadata(str(path))
    kind, rule = (settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    backend = read.backend_tokenizer
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if kind == "llama":
        # llama.cpp adds a space before a text that begins with spaces, too
        spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
        if settings.get("tokenizer.ggml.add_space_prefix", True):
            spaces.insert(0, normalizers.Prepend(_SPACE))
        backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(spaces), None
    elif kind != "gpt2":
        raise ColdstillError(
            f"{where}: {path.name} has a tokenizer of the kind {kind!r}, and only 'gpt2' and "
            "'llama' can be rebuilt; use a folder with the model's own tokenizer.json"
        )
    elif rule in _DIGITS_RULE:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, whole])
    elif rule in _GPT2_RULE:
        backend.pre_tokenizer = whole
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        known = ", ".join(sorted((*_GPT2_RULE, *_DIGITS_RULE)))
        raise ColdstillError(
            f"{where}: the file names the pre-tokenizer {rule!r}, which neither transformers nor "
            "coldstill can rebuild, so its tokens would differ from those that the model was "
            f"trained on; use a folder with the model's own tokenizer.json (known here: {known})"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        **{name: str(token) for name, token in read.special_tokens_map.items() if token},
    )


def _existing(path: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(folder for folder in path.parents if folder.is_dir())
