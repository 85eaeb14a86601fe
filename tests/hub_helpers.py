"""What the functions that run in the client's process build on; see `hub_client.py`."""

OTHER_TOKEN = "hf_tokenofsomebodyelsewhoisnotknown"
TINY = {
    "image_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32, "local_branch_layers": 1, "local_branch_channels": 8,
}  # fmt: skip


def purifier(seed: int = 0, **config):
    """A tiny purifier that is not the identity."""
    import torch

    from maep_hf import MAEPConfig, MAEPModel

    torch.manual_seed(seed)
    model = MAEPModel(MAEPConfig(**TINY | config))
    for head in (model.local_branch.head, model.decoder.head):
        torch.nn.init.normal_(head.weight, std=0.02)  # zeros would be the identity, with any adapter
    return model.eval()


def same(one, other) -> bool:
    """Whether two modules have the same weights."""
    import torch

    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def failure(function, *args, **options) -> str:
    """The error as text; the client's own exceptions do not travel between processes."""
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def classifier(classes: int = 2):
    """An untrained CIFAR ResNet."""
    from maep_hf import CifarResNetConfig, CifarResNetForImageClassification

    names = {index: f"class{index}" for index in range(classes)}
    return CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4, id2label=names))


def python_blocks(text: str) -> list[str]:
    """The Python code of a page."""
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]
