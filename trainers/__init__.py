"""The trainers nnU-Net finds by -tr, through nnUNet_extTrainer. Installed as nnunet_transplant.trainers."""
