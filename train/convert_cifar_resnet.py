"""Convert published CIFAR ResNet weights into a transformers folder.

python train/convert_cifar_resnet.py resnet20.th --out resnet20

The files are those of github.com/akamaster/pytorch_resnet_cifar10 (pretrained_models/, BSD-2).
"""

import argparse

from maep_hf.convert_cifar_resnet import convert_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="published weights, as torch or safetensors wrote them")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args()
    try:
        model = convert_file(args.source, args.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {args.out}: CIFAR ResNet-{model.config.depth}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
