"""Benchmarks: see README.md. Each script pairs two sides in turns in one run and writes one JSON record."""

import os

# As the command line sets them, before torch is imported: no hub, and threads that wait without burning a core.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(_name, _value)
