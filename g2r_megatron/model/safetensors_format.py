"""The safetensors format: where a directory's tensors are. Everything is checked that needs no reading of tensors."""

import json
import math
import os
import re
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from g2r_megatron.data.stand_ins import HEAD_BYTES, check_stand_ins, refuse_stand_in, unfinished_download
from g2r_megatron.errors import UserError, warn

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of weights
# Of other tensors in the files (position_ids, leftovers of a quantization); no weight is read in these dtypes.
OTHER_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
OF_TRAINING = re.compile(r"global_step\d+$|pytorch_model_fsdp_\d+$|zero_to_fp32\.py$|__\d+_\d+\.distcp$")
PICKLES = (".bin", ".pt", ".pth")
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones
NAME_OF = {dtype: name for name, dtype in {**OTHER_DTYPES, **DTYPES}.items()}
NO_QUANTIZED = f"must be one of {sorted(DTYPES)}; quantized checkpoints cannot be loaded: dequantize it first"
PICKLE_HEADS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")  # of torch.save, and of pickle


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``offset`` is its first byte in ``file``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def columns(self) -> int:
        """Last dimension of the 2-D view; 1 for 1-D tensors and scalars."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """All other dimensions of the 2-D view, flattened."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize


def open_regular(file: Path) -> int:
    """A descriptor of a regular file that can be read, else ``UserError``."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise UserError(str(file), "is not a regular file", "restore the safetensors file")
        return os.open(file, os.O_RDONLY)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            _refuse_missing_file(file, f"it is a link to {os.readlink(file)}")
        raise UserError(
            str(file), f"cannot be opened ({error.strerror})", "restore the file or its permissions"
        ) from error


def pread(fd: int, file: Path, offset: int, out: memoryview) -> None:
    """Fills ``out`` (bytes) from byte ``offset`` on. Raises ``UserError`` when the file ends before or fails."""
    done = 0
    while done < len(out):  # one call reads at most 2 GB
        try:
            count = os.preadv(fd, [out[done:]], offset + done)
        except OSError as error:
            found = f"cannot be read at byte {offset + done} ({error.strerror})"
            raise UserError(str(file), found, "copy or download the file again") from error
        if count == 0:
            found = f"ends at byte {offset + done}, shorter than when it was opened"
            raise UserError(str(file), found, "copy or download the file again")
        done += count


def _parse_json(text: bytes, where: Path, what: str) -> dict:
    """A JSON object without repeated keys (of which Python would silently keep the last)."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated = next(key for key, count in counts.items() if count > 1)
            raise UserError(str(where), f"{what} has the key {repeated!r} more than once", "save the model again")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(str(where), f"{what} is not JSON ({error})", "restore the file") from error
    if not isinstance(parsed, dict):
        raise UserError(str(where), f"{what} is not a JSON object", "restore the file")
    return parsed


def _refuse_other_kinds(file: Path, head: bytes) -> None:
    """Raise ``UserError`` when a file begins as no safetensors file does, saying what it is."""
    refuse_stand_in(file, head)
    if head.startswith(PICKLE_HEADS) and head[8:9] != b"{":  # a header's length may begin with the same bytes
        remedy = "save the model with safe_serialization=True: pickle files can run code when they are read"
        raise UserError(str(file), f"is a pickle file with the suffix {SUFFIX}", remedy)
    if not any(head[:8]):
        remedy = "download the file again: its room was reserved, its content never came"
        raise UserError(str(file), "begins with zeros, an unfinished download", remedy)


def read_header(fd: int, file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file in the order of their data, which must fill it without gap or overlap."""

    def refuse(found: str, remedy: str = "copy or download the file again"):
        raise UserError(str(file), found, remedy)

    size = os.fstat(fd).st_size
    if size < 8:
        refuse(f"has only {size} bytes, is no safetensors file")
    beginning = bytearray(min(size, HEAD_BYTES))
    pread(fd, file, 0, memoryview(beginning))
    _refuse_other_kinds(file, bytes(beginning))
    start = beginning[:8]
    length = int.from_bytes(start, "little")
    if length > LONGEST_HEADER:
        refuse(f"header of {length} bytes, at most {LONGEST_HEADER} are possible", "must be a safetensors file")
    if 8 + length > size:
        refuse(f"is truncated: header of {length} bytes in a file of {size}")
    text = bytearray(length)
    pread(fd, file, 8, memoryview(text))
    entries = _parse_json(bytes(text), file, "header")
    entries.pop("__metadata__", None)
    tensors = {name: _tensor_info(file, 8 + length, name, entry) for name, entry in entries.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes))
    end = 8 + length
    for name, info in ordered:
        if info.offset != end:
            problem = "overlaps the tensor before it" if info.offset < end else "leaves a gap before it"
            raise UserError(f"{file} {name}", f"data_offsets {problem}", "save the model again")
        end += info.nbytes
    if size != end:
        refuse(f"{'is truncated' if size < end else 'is too long'}: {size} bytes, its header describes {end}")
    return dict(ordered)


def _tensor_info(file: Path, data_start: int, name: str, entry: object) -> TensorInfo:
    """One checked entry of a header: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}."""

    def refuse(found: str, remedy: str = "save the model again") -> NoReturn:
        raise UserError(f"{file} {name}", found, remedy)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("header entry is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for key in ("shape", "data_offsets"):
        if not isinstance(entry[key], list) or any(type(n) is not int or n < 0 for n in entry[key]):
            refuse(f"{key} {entry[key]!r} is not a list of whole numbers")
    known = {**OTHER_DTYPES, **DTYPES}
    if not isinstance(dtype, str) or dtype not in known:
        refuse(f"dtype {dtype}", NO_QUANTIZED)
    nbytes = math.prod(shape) * known[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        refuse(f"data_offsets {offsets} are not the {nbytes} bytes of {dtype} {shape}")
    return TensorInfo(known[dtype], tuple(shape), file, data_start + offsets[0], nbytes)


def model_files(directory: Path) -> dict[Path, set[str] | None]:
    """Each file of a model, and the tensors that the index places in it: None for a lone model.safetensors.

    As in transformers, a model.safetensors beside an index is the model; a warning names the ignored files.
    """
    try:
        present = set(os.listdir(directory))
    except OSError as error:
        remedy = "must be a directory with safetensors files"
        raise UserError(str(directory), f"cannot be read ({error.strerror})", remedy) from error
    if SINGLE in present:
        files: dict[Path, set[str] | None] = {directory / SINGLE: None}
    elif INDEX in present:
        files = _read_index(directory / INDEX)
    else:
        _refuse_without_weights(directory, present)
    for file in files:
        if file.name not in present:
            _refuse_missing_file(file, f"{INDEX} names it")
    aside = {name for name in present if name.endswith(SUFFIX)} - {file.name for file in files}
    if INDEX in present and SINGLE in present:
        aside.add(INDEX)
    if aside:
        read = SINGLE if SINGLE in present else f"the files of {INDEX}"
        warn(f"{directory}: {read} are the weights, as for transformers; left aside: {', '.join(sorted(aside))}")
    return files


def _refuse_missing_file(file: Path, why: str) -> None:
    if part := unfinished_download(file.parent):
        raise UserError(str(file), f"is missing ({why}); {part.name} is an unfinished download", "finish the download")
    raise UserError(str(file), f"is missing ({why})", "restore the missing shard")


def placed_tensors(found: dict[Path, dict[str, TensorInfo]], expected: dict[Path, set[str] | None]) -> dict:
    """All tensors of a model by name, from its files' (``read_header``) and what the index says of them.

    An old index does no harm if every tensor is in one file only. Raises ``UserError`` for a tensor that
    is in no file, and for one in two files of which the index names neither.
    """
    holders: dict[str, list[Path]] = {}
    for file, infos in found.items():
        for name in infos:
            holders.setdefault(name, []).append(file)
    tensors: dict[str, TensorInfo] = {}
    for name, files in holders.items():
        named = [file for file in files if len(files) == 1 or name in (expected[file] or ())]
        if len(named) != 1:
            both = f"holds {name}, and so does {files[1].name}"
            raise UserError(str(files[0]), both, f"{INDEX} must name one of them")
        tensors[name] = found[named[0]][name]
    stale = []
    for file, names in expected.items():
        for name in sorted((names or set()) - found[file].keys()):
            if name not in tensors:
                raise UserError(
                    str(file), f"does not hold {name}, which {INDEX} places there", "restore the file or the index"
                )
            stale.append(name)
    if stale:
        warn(f"{next(iter(found)).parent / INDEX}: names another file for {stale[0]} (of {len(stale)}) than holds it")
    return tensors


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    check_stand_ins(index)
    try:
        text = index.read_bytes()
    except OSError as error:
        raise UserError(str(index), f"cannot be read ({error.strerror})", "restore the file") from error
    weight_map = _parse_json(text, index, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(str(index), "weight_map is not an object of tensor and file names", "restore the file")
    expected: dict[Path, set[str] | None] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(SUFFIX):
            raise UserError(str(index), f"names {file!r}", f"must be a *{SUFFIX} file of the same directory")
        expected[index.parent / file] = {name for name, where in weight_map.items() if where == file}
    return expected


def _refuse_without_weights(directory: Path, present: set[str]) -> None:
    if part := unfinished_download(directory):
        found = f"has neither {SINGLE} nor {INDEX}, but {part.name}, an unfinished download"
        raise UserError(str(directory), found, "finish the download")
    pickles = sorted(name for name in present if name.endswith(PICKLES))
    safetensors = sorted(name for name in present if name.endswith(SUFFIX))
    if safetensors:
        remedy = f"restore {INDEX}, or call an only file {SINGLE}; an adapter must be merged into its model first"
        raise UserError(str(directory), f"has {safetensors[0]}, but neither {SINGLE} nor {INDEX}", remedy)
    if pickles:
        remedy = "weights must be safetensors files; save the model with safe_serialization=True"
        raise UserError(str(directory), f"has only pickle files ({pickles[0]})", remedy)
    if others := sorted(name for name in present if name.endswith(".gguf") or OF_TRAINING.match(name)):
        remedy = "write the model in Hugging Face's format (safetensors) with the tool that made it"
        raise UserError(str(directory), f"has {others[0]}, but neither {SINGLE} nor {INDEX}", remedy)
    raise UserError(str(directory), f"has neither {SINGLE} nor {INDEX}", "must hold a model's safetensors files")


def split_into_files(
    directory: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], limit: int
) -> dict[Path, list[str]]:
    """File -> its tensors: in order, a new file when the next one would make it longer than ``limit`` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    if len(shards) == 1:
        return {directory / SINGLE: shards[0]}
    return {directory / f"model-{i:05d}-of-{len(shards):05d}{SUFFIX}": names for i, names in enumerate(shards, 1)}


def make_header(
    file: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """A file's first bytes, and where its tensors lie: wider dtypes first, so that each starts at a multiple of its own."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        if dtype not in DTYPES.values() or name == "__metadata__":
            raise ValueError(f"{name} ({dtype}) cannot be written: dtypes {sorted(DTYPES)}")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAME_OF[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    entries.pop("__metadata__")
    return header, {name: _tensor_info(file, len(header), name, entry) for name, entry in entries.items()}
