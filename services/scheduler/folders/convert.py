"""Between a claimed folder and the message that hands it to a node."""

from finemesh.nodes.v1 import node_service_pb2
from services.scheduler.folders.job_folders import ClaimedFolder
from services.scheduler.jobs.convert import artifact_from_bytes, folder_key_prefix, job_name


def folder_to_proto(folder: ClaimedFolder) -> node_service_pb2.JobFolder:
    message = node_service_pb2.JobFolder(
        tuning_job=job_name(folder.ref),
        key_prefix=folder_key_prefix(folder.ref),
        claim=str(folder.claim),
        checkpoints=[artifact_from_bytes(artifact) for artifact in folder.kept.checkpoints],
    )
    if folder.kept.model is not None:
        message.model.CopyFrom(artifact_from_bytes(folder.kept.model))
    return message
