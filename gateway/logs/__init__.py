"""How a process writes its log.

:mod:`.configuration` has the formats and is the file to read first; :mod:`.stderr` is the bounded
queue that every line goes through, so that a reader who stops reading stops no worker, and
:class:`Throttle` keeps a flood of warnings of one kind down to one line a minute.

This package must not know what the lines say.
"""

from gateway.logs import stderr
from gateway.logs.configuration import configuration, set_level
from gateway.logs.throttle import Throttle

__all__ = ["Throttle", "configuration", "set_level", "stderr"]
