from argparse import Namespace

from nnunet_transplant.cli.common import command_parser, run_command
from nnunet_transplant.environment import ext_trainer_value


def main() -> None:
    run_command(command_parser(
        "trainers",
        "Prints the value for nnUNet_extTrainer, a fourth variable beside nnU-Net's three: with it, nnUNetv2_train\n"
        "finds nnUNetTrainerStable, nnUNetTrainerPlastic and nnUNetTrainerTaskVector (and any _Nepochs of them).",
        'export nnUNet_extTrainer="$(nnunet_transplant_trainers)"'), print_trainers)


def print_trainers(_: Namespace) -> None:
    print(ext_trainer_value())
