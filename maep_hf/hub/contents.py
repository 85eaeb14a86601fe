"""What of a folder goes to the Hub, in the form in which it goes there: no local path, no token, nothing unlisted."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, get_token

from ..paths import short_names, text_without_paths, without_paths
from ..records import as_jsonl
from .folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    IMAGE_PROCESSOR,
    PAIRS,
    PAIRS_RECORD,
    PROCESSORS,
    PURIFIER,
    Kind,
    files_of,
    read_json,
    run_record,
)

_TEXT = (".json", ".jsonl", ".md", ".csv", ".py", "")
_PACKAGE = Path(__file__).resolve().parents[1]
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
# Read by programs: a pattern such as `\.layers\.` or a class `/m/01g317` has the look of a path and must stay as it is.
_SETTINGS = ("config.json", ADAPTER_CONFIG, *PROCESSORS)
_PATH_FIELD = re.compile(r"(path|dir|file|folder)$")
PIPELINE = {"impl": "pipeline_maep.ImagePurificationPipeline", "pt": ["AutoModel"], "type": "image"}
IMAGE_PROCESSOR_CLASS = "image_processing_maep.MAEPImageProcessor"


class LeakError(ValueError):
    """A file holds something that must not leave this machine; the message names the file."""


def operations_of(
    folder: Path, kind: Kind, *, base_model: str | None = None, token: str | None = None
) -> list[CommitOperationAdd]:
    """The files of a push, whole and in their final form; the README is not among them.

    Texts lose the paths of this machine (configurations in the fields that hold paths alone), the code is that of this
    package, `config.json` of a purifier names the pipeline, and `adapter_config.json` names the base on the Hub.

    Args:
        base_model: Hub id of an adapter's base.
        token: of this push, which no file may hold.

    Raises:
        LeakError: a text holds a Hub token, or a path of this machine that could not be taken out.
        ValueError: a file that should be JSON is not.
    """
    contents: dict[str, bytes | Path] = {}
    for path in files_of(folder, kind):
        contents[path.relative_to(folder).as_posix()] = path
    for name in kind.code:
        contents[name] = _PACKAGE / name
    if kind is ADAPTER and "run.json" not in contents and (run := run_record(folder)):
        contents["run.json"] = _json(without_paths(run))
    if kind in (PURIFIER, IMAGE_PROCESSOR):
        contents["preprocessor_config.json"] = _image_processor(folder)
    for name, content in contents.items():
        if isinstance(content, Path) and content.suffix in _TEXT:
            contents[name] = _clean_text(content)
    if kind is PURIFIER:
        contents["config.json"] = _json(_with_pipeline(json.loads(contents["config.json"])))
    if kind is ADAPTER:
        adapter = json.loads(contents[ADAPTER_CONFIG])
        if adapter.get("base_model_name_or_path") != base_model:  # its revision is of another repository
            adapter |= {"base_model_name_or_path": base_model, "revision": None}
        contents[ADAPTER_CONFIG] = _json(adapter)
    if kind is PAIRS:
        contents |= _clean_pairs(folder, {name: path for name, path in contents.items() if name.endswith(".parquet")})
    for name, content in contents.items():
        if isinstance(content, bytes) and Path(name).suffix in _TEXT:
            check_for_leaks(name, content, folder, token)
    return [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]


def check_for_leaks(name: str, content: bytes, folder: Path, token: str | None = None) -> None:
    """Refuse a text with a token, or with the path of the home, the working directory, the folder or its parent.

    Raises:
        LeakError: it has one.
    """
    if _TOKEN.search(content) or any(known and known.encode() in content for known in (token, get_token())):
        raise LeakError(f"{name} in {folder} holds a Hub token; take it out (and revoke it) before you push")
    for place in (Path.home(), Path.cwd(), folder.resolve(), folder.resolve().parent):
        if place != place.parent and f"{place}/".encode() in content:
            raise LeakError(f"{name} in {folder} names a path of this machine, {place}; take it out before you push")


def _clean_text(path: Path) -> bytes:
    text = path.read_bytes()
    if path.suffix == ".py":
        return text
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if path.name in _SETTINGS:
        return _json(_without_path_fields(read_json(path)))
    if path.suffix == ".json":
        return _json(without_paths(read_json(path)))
    if path.suffix != ".jsonl":
        return text_without_paths(decoded).encode()
    try:
        lines = [json.loads(line) for line in decoded.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from error
    return as_jsonl(map(without_paths, lines)).encode()


def _without_path_fields(settings: Any) -> Any:
    """A configuration whose fields that hold paths, such as `_name_or_path`, have none of this machine."""
    if isinstance(settings, list):
        return [_without_path_fields(entry) for entry in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        name: without_paths(entry) if _PATH_FIELD.search(name) else _without_path_fields(entry)
        for name, entry in settings.items()
    }


def _clean_pairs(folder: Path, files: Mapping[str, Path]) -> dict[str, Path | bytes]:
    """Surrogates of stored pairs are as they were typed, perhaps with a path of this machine: in every file of them and
    in their record one has the same name, and no two have."""
    recorded = read_json(folder / PAIRS_RECORD).get("arguments", {}).get("pairs", {}).get("surrogates") or []
    named = short_names(name for name in recorded if isinstance(name, str))  # as `without_paths` does in the record
    taken = [kept for name, kept in named.items() if kept != name]
    found = {name: _surrogates(path) for name, path in files.items()}
    others = [each for names in found.values() for each in names if each not in named]
    named |= short_names(others, taken)  # one that the record holds without its path is the same
    return {
        name: _renamed(files[name], named) if any(named[each] != each for each in names) else files[name]
        for name, names in found.items()
    }


def _surrogates(path: Path) -> list[str]:
    """Each one that a file of pairs names."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if "surrogate" not in file.schema_arrow.names:
        return []
    names = file.read(columns=["surrogate"]).column("surrogate").unique().to_pylist()
    return [name for name in names if isinstance(name, str)]


def _renamed(path: Path, names: Mapping[str, str]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    stream = io.BytesIO()
    with pq.ParquetWriter(stream, file.schema_arrow) as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            index = table.schema.get_field_index("surrogate")
            renamed = [names.get(name, name) for name in table.column(index).to_pylist()]
            field = table.schema.field(index)
            writer.write_table(table.set_column(index, field, pa.array(renamed, field.type)))
    return stream.getvalue()


def _with_pipeline(config: Mapping[str, Any]) -> dict[str, Any]:
    code = {"AutoConfig": "configuration_maep.MAEPConfig", "AutoModel": "modeling_maep.MAEPModel"}
    return {**config, "auto_map": code, "custom_pipelines": {"image-purification": PIPELINE}}


def _image_processor(folder: Path) -> bytes:
    """The folder's image processor, or the one that keeps every image's size; with the place of its code."""
    from ..image_processing_maep import MAEPImageProcessor

    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = read_json(path)
        if settings.get("image_processor_type") != "MAEPImageProcessor":
            raise ValueError(f"{path} is not of a MAEPImageProcessor: the pixels of a purifier are in [0, 1]")
    else:
        channels = read_json(folder / "config.json").get("num_channels", 3)
        settings = json.loads(MAEPImageProcessor(do_convert_rgb=channels == 3).to_json_string())
    return _json(_without_path_fields(settings) | {"auto_map": {"AutoImageProcessor": IMAGE_PROCESSOR_CLASS}})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
