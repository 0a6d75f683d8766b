"""A hook of MkDocs: pictures that experiments draw are shown from where they lie, `../experiments/...`."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: Any) -> Files:
    """The pages and, under the names that the pages link them by, the experiments' pictures."""
    for picture in sorted((ROOT / "experiments").rglob("*.png")):
        place = picture.relative_to(ROOT).as_posix()
        file = File.generated(config, f"../{place}", abs_src_path=str(picture), inclusion=InclusionLevel.INCLUDED)
        file.dest_uri = place
        files.append(file)
    return files
