"""nnunet_transplant_split_tasks: task datasets with the same images and a part of the labels each."""
import argparse

from nnunet_transplant.cli.common import command_parser, run_command


def main() -> None:
    parser = command_parser(
        "split_tasks",
        "Split a labelled nnU-Net dataset into task datasets: ordinary nnU-Net datasets, raw and preprocessed, that "
        "share the images and have a part of the labels each.",
        "nnunet_transplant_split_tasks -d 4 -tasks Liver=liver Kidney=left_kidney,right_kidney Both=liver+spleen "
        "-ids 901 902 903")
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or id of the dataset to split")
    parser.add_argument("-tasks", required=True, nargs="+", metavar="NAME=LABELS",
                        help="the tasks: a comma joins labels into one class, + separates classes; labels by name or "
                             "number, ranges such as 11-18")
    parser.add_argument("-ids", required=True, nargs="+", type=int, metavar="ID",
                        help="a free dataset id for each task")
    parser.add_argument("-p", metavar="PLANS", help="plans name, default: nnUNetPlans, or as a model's are called")
    parser.add_argument("-plans_from", metavar="DATASET|MODEL",
                        help="take the plans of this dataset, or of this trained model folder (nothing else of it need "
                             "be on this machine), and preprocess the images under them, so that models of both can be "
                             "merged")
    parser.add_argument("-cases", metavar="FILE",
                        help="a file with one case id per line, or a fold of the dataset as train:0 or val:0, default: "
                             "all cases")
    parser.add_argument("--regions", action="store_true",
                        help="make regions of the classes: nnU-Net trains a sigmoid for each, instead of one softmax")
    parser.add_argument("-np", type=int, metavar="N", help="number of processes, default: nnU-Net's")
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="take a model whose checkpoint or plans ask for more than weights; they can run code")
    run_command(parser, _split)


def _split(args: argparse.Namespace) -> None:
    from nnunet_transplant.data.task_dataset import default_num_processes, split_tasks  # slow import: -h stays quick

    split = split_tasks(args.d, args.tasks, args.ids, plans_name=args.p, plans_from=args.plans_from, cases=args.cases,
                        regions=args.regions,
                        num_processes=default_num_processes if args.np is None else args.np,
                        trust=args.trust_checkpoints, progress=True)
    for note in split.notes:
        print(note)
    configuration = "3d_fullres" if "3d_fullres" in split.configurations else split.configurations[0]
    plans = "" if split.plans_name == "nnUNetPlans" else f" -p {split.plans_name}"
    for task in split.tasks:
        labels = ", ".join(f"{name}={value}" for name, value in task.labels.items())
        print(f"\n{task.name}: {len(task.cases)} cases, labels {labels}\n"
              f"  raw:          {task.raw_folder}\n"
              f"  preprocessed: {task.preprocessed_folder} ({', '.join(split.configurations)})\n"
              f"  train: nnUNetv2_train {task.name[7:10]} {configuration} 0{plans} -tr nnUNetTrainerTaskVector "
              f"-pretrained_weights {split.checkpoint or 'BASE_CHECKPOINT'}")


if __name__ == "__main__":
    main()
