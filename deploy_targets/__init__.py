"""Turns high-fidelity weights into something a cheap machine can serve, runs it, measures it.

Knows nothing of RL, and importing it needs no torch. See `profile.py` for targets, `protocols.py` for what an
engine and a quantizer are, `verify.py` for what is measured on the serving machine.
"""
