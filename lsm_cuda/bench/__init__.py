"""Measuring operators beside their peers: used by ``lsm bench`` and by ``benchmarks/``.

``registry`` says what is measured, ``peers`` against what, ``measure`` how, ``roofline`` what the
machine could do at best, ``plots`` draws it. A result is a dict ``{"environment": ..., "rows":
[...]}`` that goes to json as it is.
"""
