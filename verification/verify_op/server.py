"""The child process: opens the shared object, calls what it is asked to, sends results back.

Imports neither torch nor the suite, so that it starts in a moment; holds no judgement. One request
is (operation, arguments, poison); one answer (kind, result, complaints), where kind is "result",
"error" or, for a fault of this suite, "broken".
"""

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from engine.errors import EngineError
from engine.foreign import ForeignLibrary, ForeignOps


def serve(path: Path, connection: Connection) -> None:
    """Answers requests until the other end closes."""
    try:
        library = ForeignLibrary(path)
        ops = ForeignOps(library)
    except EngineError as error:
        connection.send(("error", str(error), []))
        return
    connection.send(("result", None, []))
    while True:
        try:
            operation, arguments, poison = connection.recv()
        except EOFError:
            return
        library.poison = poison
        try:
            result = getattr(ops, operation)(*arguments)
            kind = "result"
        except EngineError as error:
            kind, result = "error", str(error)
        except Exception as error:  # ours, not the stranger's: the other end must know
            kind, result = "broken", repr(error)
        complaints, ops.complaints = ops.complaints, []
        connection.send((kind, result, complaints))


if __name__ == "__main__":
    os.dup2(2, 1)  # what the stranger prints must not pass for the suite's own output
    serve(Path(sys.argv[1]), Connection(int(sys.argv[2])))
