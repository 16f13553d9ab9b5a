"""What every test shares: shape annotations are checked, examples are drawn alike, one thread computes."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: the last bits depend on it

from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything imports these packages: their jaxtyping annotations become checks, here and nowhere else.
install_import_hook(
    ["molkd.pipeline.graphs", "molkd.pipeline.models", "molkd.pipeline.distill"], "beartype.beartype"
)

import torch  # noqa: E402

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

torch.set_num_threads(1)
