"""The end of a run that came through: the artefact, the proof that it is the trained model, and where it comes from."""

from dataclasses import asdict

from formats.manifests import revision_of
from services.trainer.train.disk.durable import commit_folder
from services.trainer.train.export.exported_files import write_export
from services.trainer.train.export.lineage import lineage_of
from services.trainer.train.export.parity import check_parity
from services.trainer.train.loop.early_stopping import ship_best
from services.trainer.train.loop.state import Run
from services.trainer.train.modeling.fsdp import whole
from services.trainer.train.settings.failures import Stopped


def export_and_prove(run: Run) -> str:
    """Writes the artefact and shows that it is the trained model; returns its revision."""
    if run.stopping():
        raise Stopped
    inputs, spec = run.inputs, run.inputs.spec
    ship_best(run)
    target = inputs.workdir / "export"
    trained = whole(run.model.trainable, keep=run.group.leads) if run.group.sharded else None
    files = []
    if run.group.leads:
        ends = inputs.ends if inputs.ends > inputs.base_ends else frozenset()
        files = commit_folder(
            target, lambda folder: write_export(run.model, spec, folder, trained, ends=ends), manifest=None
        )
    rows = inputs.validation.rows if inputs.validation else inputs.train.rows
    # No step follows, and what scores the export needs the room.
    run.optimizer.state.clear()
    report = check_parity(run.model, spec, target, rows, ends=inputs.ends, leads=run.group.leads)
    if report is None:
        return ""
    revision = revision_of(files)
    run.emit(
        "exported",
        path=str(target),
        files=[asdict(file) for file in files],
        revision=revision,
        parity=asdict(report),
        lineage=lineage_of(inputs, run.position),
    )
    return revision
