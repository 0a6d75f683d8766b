"""Files a finished run of `sva train` as the record of a cell: how those of the paper's scale come into its tables."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from experiments.paper import plan
from experiments.paper.cells import Cell, digest_of_flat, flat_of
from experiments.paper.records import Store
from experiments.paper.scales import Scale
from experiments.paper.training import record_of
from sva.evaluation import evaluate as evaluation
from sva.training import metrics
from sva.utils.errors import UserError
from sva.utils.files import read_json


def file_run(run_dir: Path, scales: Sequence[Scale], store: Store) -> Cell:
    """The cell whose settings a run has; its record is filed, and its expert where studies read it.

    A run's files say neither its device, so that the record has none, nor the revisions of what trained and graded it:
    they are taken to be the current ones.

    Raises:
      UserError: the run is not finished, or its settings are those of no cell.
    """
    if not (run_dir / "result.json").is_file():
        raise UserError(f"{run_dir} holds no finished run of `sva train` (no result.json); give its run_dir")
    result = read_json(run_dir / "result.json")
    cell = _cell(digest_of_flat(flat_of(result["config"])), scales, store)
    if cell is None:
        raise UserError(
            f"{run_dir} has the settings of no cell; train with a command that "
            "`python -m experiments.paper.run_cells --scale paper --dry-run` lists"
        )
    made = {"device": "not recorded", **{name: result[name] for name in ("versions", "command", "seconds")}}
    before, after = (evaluation.stored(run_dir / f"{when}.jsonl") for when in ("before", "after"))
    store.put(cell, record_of(cell, result, metrics.read(run_dir / "metrics.jsonl"), made, before, after))
    if cell.is_kept:
        store.expert_path(cell).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run_dir / "expert.safetensors", store.expert_path(cell))
    return cell


def _cell(digest: str, scales: Sequence[Scale], store: Store) -> Cell | None:
    listed = [each for scale in scales for each in plan.presumed(scale, store.get) if isinstance(each, Cell)]
    return next((cell for cell in listed if cell.digest == digest), None)
