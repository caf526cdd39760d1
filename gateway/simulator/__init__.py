"""A stand-in for LM Studio: its SDK WebSockets and its HTTP API on one port, without a model.

For trying the gateway, for its tests and for CI. Start it with ``python -m gateway.simulator``;
it always lives in a process of its own, because that process is monkey-patched by gevent.
``shared/lmstudio.md`` of the design is the source of the protocol facts, the ``lmstudio`` 1.5.0
package the source of the message shapes. Tests steer it with request headers (:mod:`.faults`) and
with the control paths below ``/_simulator/`` (:mod:`.control`).

Nothing is exported here: the entry, :mod:`.__main__`, must patch the process before anything else
of the package is imported.
"""
