"""The method as pure functions: tensors in, tensors out, no I/O.

`advantage` (how good was a response), `discrepancy` (how far apart are learner and engine), `corrections` (importance
weights), `losses` (policy loss), `signals` (how the constraint reaches the gradient), `constraint` (the multiplier),
`tolerance` (the floor).
"""
