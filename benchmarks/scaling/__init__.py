"""How long a step takes on machines that are not here: measured phases, a simulation that is checked against them, and a plan."""
