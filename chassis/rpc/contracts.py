"""The descriptors that a server's reflection may show: those of its own services and what they build on."""

from collections.abc import Iterable

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor


def pool_of(service_full_names: Iterable[str]) -> descriptor_pool.DescriptorPool:
    """Reflection over the default pool would describe every contract that the process has ever imported, so that a
    public server would show internal ones. A service without a descriptor is left out."""
    known, shown = descriptor_pool.Default(), descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        shown.AddSerializedFile(file.serialized_pb)

    for name in service_full_names:
        try:
            file = known.FindFileContainingSymbol(name)
        except KeyError:
            continue
        add(file)
    return shown
