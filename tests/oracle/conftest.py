import torch

# The models are tiny: a second thread would only wait, most of all on a busy machine.
torch.set_num_threads(1)
