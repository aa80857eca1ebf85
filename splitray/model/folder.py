"""A model's folder: which files transformers would take, and what is refused by name. Reads no tensors."""

import os
import re
from pathlib import Path
from typing import Any

from splitray.errors import InputError, ModelError
from splitray.model.recurrent import refuse_recurrent
from splitray.model.weights.stored.method import method_of
from splitray.user_file import UserFile

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"  # how the stand-in of a large file begins
_SAVE = "save the model with save_pretrained (safetensors)"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


def model_folder(model: str | Path) -> Path:
    """The folder (or the GGUF file) of a path as a user gives it, `~` included.

    Raises:
        ModelError: it is neither, or its name cannot go through messages to devices.
    """
    folder = Path(model).expanduser()
    try:
        os.fspath(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise _refused(ascii(os.fsencode(folder)), "a path in UTF-8", "other bytes", "rename the folder") from error
    if os.path.isdir(folder) or (_is_gguf(folder) and os.path.isfile(folder)):
        return folder
    if os.path.exists(folder):
        remedy = "give the folder that it lies in; if it is a GGUF file, a link to it whose name ends with .gguf"
        raise _refused(folder, "a folder with config.json, or a .gguf file", "another file", remedy)
    if _is_gguf(folder):
        raise _refused(folder, "a GGUF file", "no such file", "give the path of a file that ends with .gguf")
    remedy = "give the path of a saved model"
    if not folder.is_absolute() and len(folder.parts) == 2 and str(model)[0] not in ".~":
        remedy = f"models are folders here: if this is a name on a hub, run `hf download {model} --local-dir DIR` first"
        remedy += ", and give DIR"
    raise _refused(model, "a folder with config.json", "no such folder", remedy)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and not os.path.isdir(path)


def gguf_parts(model: str | Path) -> list[Path]:
    """The GGUF file that a model is, or all the parts of a split one; none: it is a folder with a config.

    A path names the file or any part of it; a folder without safetensors may have but one model.

    Raises:
        ModelError: there are several models in the folder, or parts are missing.
    """
    path = Path(model).expanduser()
    if not _is_gguf(path):
        if not os.path.isdir(path) or _has_safetensors(path):
            return []
        found = sorted(p for p in path.glob("*.gguf") if not p.name.startswith("mmproj"))
        if not found:
            return []
        if len({_PART.sub(r"\1", p.name) for p in found}) > 1:
            raise _refused(path, "one GGUF file, or the parts of one", [p.name for p in found],
                           "give the path of one file")  # fmt: skip
        path = found[0]
    path = model_folder(path)
    if (named := _PART.match(path.name)) is None:
        return [path]
    parts = [path.with_name(f"{named[1]}-{i + 1:05}-of-{named[3]}.gguf") for i in range(int(named[3]))]
    missing = [p.name for p in parts if not p.is_file()]
    if missing:
        actual = f"no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise _refused(
            path, f"its {len(parts)} parts in one folder", actual, "copy the missing parts beside the others"
        )
    return parts


def config_values(model: str | Path) -> dict[str, Any]:
    """What config.json of a model's folder holds.

    Raises:
        ModelError: there is none, or it is no JSON object.
    """
    folder = model_folder(model)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            remedy = "merge the adapter into its base model (merge_and_unload) and save that with save_pretrained"
            raise _refused(folder, "a whole model with config.json", "an adapter only (adapter_config.json)", remedy)
        remedy = "give the path of a saved transformers model"
        raise _refused(folder, "a folder with config.json", "none there", remedy)
    return json_values(folder, path.name)


def json_values(folder: Path, name: str) -> dict[str, Any]:
    """What a JSON file of a model's folder holds.

    Raises:
        ModelError: it is no JSON object.
    """
    refuse_pointer(folder / name)
    file, what = UserFile(folder / name, "", "copy the checkpoint again"), f"model {folder}: {name}"
    try:
        values = file.json()
    except InputError as error:
        actual = f"{error.actual} ({error.what.strip()})"
        raise ModelError(what, expected="a JSON object", actual=actual, remedy=error.remedy) from error
    if not isinstance(values, dict):
        raise _damaged(what, "a JSON object", type(values).__name__)
    return values


def check_folder(model: str | Path) -> None:
    """Refuse, at once and without torch, what names, config.json and the first bytes of files tell.

    Raises:
        ModelError: no folder, no config, recurrent layers, weights quantised by a method that is not read here, or
            files that are missing, pickled or pointers.
    """
    if parts := gguf_parts(model):
        for part in parts:
            refuse_pointer(part)
        return
    values = config_values(model)
    refuse_recurrent(values)
    method_of(values)
    folder = model_folder(model)
    if has_weights(folder) or any(True for kind in _PICKLED for _ in folder.glob(kind)):
        weight_files(folder, values.get("transformers_weights"))


def is_here(model: str | Path) -> bool:
    """Whether a path leads to a model's config."""
    path = Path(model).expanduser()
    return (path / "config.json").is_file() or bool(gguf_parts(path))


def has_weights(model: str | Path) -> bool:
    """Whether a model's weights are here: safetensors in its folder, in one file or several, or a GGUF file."""
    return _has_safetensors(Path(model).expanduser()) or bool(gguf_parts(model))


def _has_safetensors(folder: Path) -> bool:
    return (folder / ONE_FILE).is_file() or (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def weight_files(folder: Path, named: str | None = None) -> list[str]:
    """The files that transformers would take the weights from: one file before an index, as it prefers them.

    `named` is the config's `transformers_weights`, which comes before both.

    Raises:
        ModelError: there are none, or one that the index names is missing or a Git LFS pointer.
    """
    if (folder / "adapter_config.json").is_file():
        remedy = "merge the adapter (merge_and_unload) and save the whole model, or move adapter_config.json away"
        raise _refused(folder, "weights without an adapter", "adapter_config.json beside them", remedy)
    if named is not None and not isinstance(named, str):
        raise _refused(folder, "transformers_weights of config.json: a file's name", named, "correct config.json")
    first = [named] if named else [ONE_FILE, INDEX]
    found = next((n for n in first if os.path.isfile(folder / n)), None)
    if found is None:
        other = sorted({p.name for kind in ("*.safetensors", *_PICKLED) for p in folder.glob(kind)})
        remedy = _SAVE
        if any(p.endswith((".bin", ".pt", ".pth", ".ckpt")) for p in other):
            remedy = f"pickled weights are not read: load them with transformers once and {_SAVE}"
        elif sum(p.endswith(".safetensors") for p in other) > 1:
            remedy = f"add {INDEX}, which says what is in which file"
        elif any(p.endswith(".safetensors") for p in other):
            remedy = f"rename the file to {ONE_FILE}"
        expected = named or "model.safetensors or its index"
        raise ModelError(f"weights in {folder}", expected=expected, actual=other or "none", remedy=remedy)
    refuse_pointer(folder / found)
    if not found.endswith(".index.json"):
        return [found]
    names = sorted(set(indexed(folder, found).values()))
    outside = [n for n in names if Path(n).is_absolute() or ".." in Path(n).parts]
    if outside or not names:
        raise _damaged(f"weights {found}", "names of files in its folder", outside[0] if outside else "none")
    missing = [n for n in names if not os.path.isfile(folder / n)]  # a name may be too long for a file
    if missing:
        found_too = f"no {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise _damaged(f"weights in {folder}", f"the {len(names)} files that {found} names", found_too)
    for name in names:
        refuse_pointer(folder / name)
    return names


def indexed(folder: Path, index: str = INDEX) -> dict[str, str]:
    """The file of each tensor, as an index says.

    Raises:
        ModelError: it says nothing of the kind.
    """
    named = json_values(folder, index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(n, str) for n in named.values()):
        raise _damaged(f"weights {index}", "a weight_map from tensors to files", type(named).__name__)
    return named


def refuse_pointer(path: Path) -> None:
    """Refuse the stand-in that Git LFS leaves where a large file was not fetched."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ModelError(f"{path}", expected="the file itself", actual="a Git LFS pointer to it",
                             remedy="run `git lfs pull` in the folder, or download the model again")  # fmt: skip


def _refused(model: object, expected: str, actual: object, remedy: str) -> ModelError:
    return ModelError(f"model {model}", expected=expected, actual=actual, remedy=remedy)


def _damaged(what: str, expected: str, actual: object) -> ModelError:
    return ModelError(what, expected=expected, actual=actual, remedy="copy the checkpoint again")
