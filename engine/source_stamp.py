"""The SHA-256 of csrc/: compiled into the library and compared at import: a stale one cannot pass.

Run as a script it prints the stamp; it needs nothing but the standard library, because make calls
it before any package is installed.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path

SUFFIXES = (".c", ".h", ".cu", ".cuh")


# The parts of csrc/ that no bit of the GPU comes from.
CPU_ALONE = ("twin",)


def source_stamp(csrc: Path, without: Collection[str] = ()) -> str:
    """Hash every source below a csrc directory, names and contents, in one order on every machine.

    Args:
        csrc: the directory that holds include/, twin/, kernels/ and the rest.
        without: folders of csrc that are left out, such as CPU_ALONE.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    paths = (
        path
        for path in csrc.rglob("*")
        if path.suffix in SUFFIXES and path.relative_to(csrc).parts[0] not in without
    )
    for path in sorted(paths, key=lambda path: path.relative_to(csrc).as_posix()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


if __name__ == "__main__":
    print(source_stamp(Path(__file__).resolve().parent.parent / "csrc"))
