"""Imported first by the process that all trials are forked from, for what an import can do there.

Ctrl-C in the terminal reaches that process too, and is the sweep's to handle. And a trial is of the
code that was there when the sweep began, whatever is edited while it goes on.
"""

import signal

from tracklight.tracking.provenance import own_code

signal.signal(signal.SIGINT, signal.SIG_IGN)
own_code()
