"""Finding and opening local files; what is missing or damaged is one clear error, never a download.

The errors of a reader name the path, what is wrong, and the format that was expected.
"""

from __future__ import annotations

import gzip
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from umbel.core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = "UMBEL_DATA"
"""The environment variable that names the folder of all data sets, for run files without a path."""


def folder(name: str, path: str | None, files: Sequence[str], expected: str) -> Path:
    """The folder that holds ``files``: ``path`` itself, or the one of the data set's name in it.

    Args:
        name: of the data set and of its folder; where there are several, separated by ``|``.
        path: what the user gave: the folder, a file in it, the root above it, or ``None`` for the
            root that the environment variable ``UMBEL_DATA`` names.
        files: what the folder must hold.
        expected: the format, for the error.

    Raises:
        InputError: no path, no such folder, or a file is not in it.
    """
    names = name.split("|")
    root = path if path is not None else os.environ.get(ROOT)
    if not root:
        raise InputError(
            f"data set '{names[0].replace('_', '-')}' has no path",
            where="[data]",
            fix=f"set path to the folder that holds {files[0]}, or the environment variable {ROOT} "
            "to the folder of all data sets; nothing is downloaded",
        )
    base = Path(root).expanduser()
    base = base.parent if base.is_file() else base
    if not base.is_dir():
        raise InputError("no such folder", where=str(base), fix=f"expected {expected}")
    places = [base, *(base / n for n in names)]
    found = next((p for p in places if (p / files[0]).is_file()), None)
    if found is None:  # the folder may be there, and only its first file missing
        found = next((p for p in places[1:] if p.is_dir()), base)
    for file in files:
        if not (found / file).is_file():
            raise InputError("no such file", where=str(found / file), fix=f"expected {expected}")
    return found


def one_file(path: str | None, suffix: str, expected: str) -> Path:
    """The user's own file: ``path`` itself, or the only one with this suffix in that folder.

    Raises:
        InputError: no path, no such file, or several.
    """
    if path is None:
        raise InputError("'path' is missing in [data]", where="[data]", fix=f"expected {expected}")
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(place.glob(f"*{suffix}"))
        if len(found) != 1:
            message = f"{len(found)} files with the suffix {suffix}, expected one"
            raise InputError(message, where=path, fix=f"name the file; expected {expected}")
        place = found[0]
    if not place.is_file():
        raise InputError("no such file", where=path, fix=f"expected {expected}")
    return place


def damaged(path: Path, message: str, expected: str) -> InputError:
    """The error of a file that is there and cannot be used."""
    return InputError(message, where=str(path), fix=f"expected {expected}")


@contextmanager
def opening(path: Path, expected: str) -> Iterator[None]:
    """Whatever goes wrong in reading ``path`` inside the block becomes one error that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise damaged(path, f"damaged or cut short: {error}", expected) from None
    except UnicodeDecodeError as error:
        raise damaged(path, f"not UTF-8 text: {error}", expected) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise damaged(path, f"cannot be read: {reason}", expected) from None


def gunzip(path: Path, expected: str) -> bytes:
    """The content of a gzip file; its checksum is verified."""
    with opening(path, expected), gzip.open(path) as file:
        return file.read()


def text(path: Path, expected: str) -> str:
    """The content of a UTF-8 text file, its line ends as ``\\n``."""
    with opening(path, expected):
        return path.read_text(encoding="utf-8")


def images(
    path: Path, suffix: str, expected: str, decode: Callable[[Image], None]
) -> list[tuple[str, ...]]:
    """Decodes every image of a zip, in the order of their names.

    Args:
        path: of the zip.
        suffix: of the image files, such as ``.png``.
        expected: the format, for the error.
        decode: is given each image in turn.

    Returns:
        the parts of the path of each image in the zip.
    """
    from PIL import Image, UnidentifiedImageError

    with opening(path, expected), zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith(suffix))
        if not names:
            raise damaged(path, f"holds no {suffix} file", expected)
        for name in names:
            content = archive.read(name)
            try:
                decode(Image.open(io.BytesIO(content)))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                raise damaged(path, f"image '{name}' is damaged: {error}", expected) from None
    return [tuple(n.split("/")) for n in names]
