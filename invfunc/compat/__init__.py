"""The names of MemCNN and InvTorch over the same values, and the donation of inputs, which both have."""
