"""The demo's trainers, in a folder of their own for nnUNet_extTrainer."""
