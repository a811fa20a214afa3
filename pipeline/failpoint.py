"""Places where a test makes a process fail.

Those named "commit" are where a file that is whole gets its name, in whichever stage.

FAILPOINT=after-manifest:kill       the process kills itself there
FAILPOINT=commit@7:term             the seventh time it is asked to end
FAILPOINT=after-file@3:ENOSPC       the third time, an OSError (any name of errno)
FAILPOINT=before-rename:2.5         it sleeps for so many seconds
"""

import collections
import errno
import os
import signal
import time

_passes: collections.Counter[str] = collections.Counter()


def failpoint(name: str) -> None:
    """Does what the environment asks for at this place; nothing where it asks for nothing."""
    wanted = os.environ.get("FAILPOINT")
    if not wanted:
        return
    place, _, action = wanted.partition(":")
    place, _, count = place.partition("@")
    _passes[name] += 1
    if place != name or (count and int(count) != _passes[name]):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif hasattr(errno, action):
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))
    else:
        time.sleep(float(action))
