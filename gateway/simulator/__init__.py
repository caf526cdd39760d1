"""A stand-in for LM Studio: its SDK WebSockets and its HTTP API on one port, without a model.

It runs in a process of its own (``lmstudio-gateway simulate``), which gevent patches before this
is imported. :mod:`.server` tells how tests steer it.
"""
