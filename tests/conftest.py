"""One thread each: the networks of the tests are small, and spinning threads of several processes stall each other."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
