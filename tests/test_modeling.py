"""MAEPConfig and MAEPModel.forward: identity at the start, masks, losses, dtypes, attention, compilation."""

import math

import pytest
import torch

from maep_hf import MAEPConfig, MAEPModel
from maep_hf.modeling_maep import sincos_positions

SMALL = {
    "image_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
    "local_branch_layers": 1,
    "local_branch_channels": 6,
}
compiled = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="transformers' own models do not compile with torch 2.6"
)
FORMS = [{}, {"local_branch_layers": 0}, {"residual": False}, {"residual": False, "local_branch_layers": 0}]


def build(perturb=0.0, **overrides):
    torch.manual_seed(0)
    model = MAEPModel(MAEPConfig(**(SMALL | overrides))).eval()
    if perturb:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(perturb * torch.randn_like(parameter))
    return model


def images(batch=3, size=16, channels=3, seed=0):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 18),
        ("patch_size", 0),
        ("num_channels", 0),
        ("num_channels", 2.0),
        ("hidden_size", 30),
        ("num_attention_heads", 3),
        ("decoder_hidden_size", 26),
        ("decoder_num_attention_heads", 5),
        ("num_hidden_layers", 0),
        ("decoder_num_hidden_layers", "2"),
        ("intermediate_size", -1),
        ("local_branch_layers", -1),
        ("local_branch_channels", 0),
        ("hidden_act", "nonsense"),
        ("hidden_dropout_prob", 1.0),
        ("mask_ratio", 1.0),
        ("mask_ratio", -0.1),
        ("mask_ratio", math.nan),
        ("reconstruction_loss_weight", -1.0),
        ("purification_loss_weight", "a"),
        ("initializer_range", 0.0),
        ("layer_norm_eps", 0),
        ("pixel_loss", "l3"),
        ("purify_mode", "tiles"),
        ("purify_strength", -1),
        ("purify_strength", "high"),
        ("residual", 1),
        ("image_mean", [0.5]),
        ("image_std", [0.5, 0.5, 0.0]),
        ("window_overlap", 0.95),
        ("window_batch_size", 0),
        ("norm_pix_loss", True),
    ],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=field):
        MAEPConfig(**(SMALL | {field: value}))


def test_config_is_checked_again_when_a_model_is_built():
    config = MAEPConfig(**SMALL)
    config.norm_pix_loss = True
    with pytest.raises(ValueError, match="norm_pix_loss"):
        MAEPModel(config)


def test_presets_accept_overrides_and_refuse_unknown_names():
    config = MAEPConfig.tiny(mask_ratio=0.25, image_size=64)
    assert (config.hidden_size, config.mask_ratio, config.num_patches) == (128, 0.25, 256)
    assert MAEPConfig.small().hidden_size == 384 and MAEPConfig.base().hidden_size == 768
    with pytest.raises(ValueError, match="mask_rato"):
        MAEPConfig.tiny(mask_rato=0.25)


def test_config_round_trip(tmp_path):
    config = MAEPConfig.tiny(pixel_loss="charbonnier", num_channels=1)
    config.save_pretrained(tmp_path)
    assert MAEPConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert config.image_mean == [0.5]


# ---------------------------------------------------------------- identity and output


@pytest.mark.parametrize("layers", [0, 1])
def test_untrained_model_is_exactly_the_identity_on_visible_pixels(layers):
    model, pixels = build(local_branch_layers=layers), images()
    assert torch.equal(model(pixels).purified_pixel_values, pixels)
    out = model(pixels, mask_ratio=0.5)
    hidden = out.mask.view(3, 1, 4, 1, 4, 1).expand(-1, 3, -1, 4, -1, 4).reshape(3, 3, 16, 16).bool()
    assert torch.equal(out.purified_pixel_values[~hidden], pixels[~hidden])
    mean = torch.tensor(model.config.image_mean).view(1, 3, 1, 1).expand_as(pixels)
    torch.testing.assert_close(out.purified_pixel_values[hidden], mean[hidden])


def test_plain_form_does_not_copy_the_input():
    pixels = images()
    change = (build(residual=False)(pixels).purified_pixel_values - pixels).abs().mean()
    assert change > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_output_is_in_range_and_every_weight_gets_a_gradient(form):
    model = build(0.3, **form).train()
    for ratio in (0.0, 0.5):
        model.zero_grad()
        out = model(images(), clean_pixel_values=images(seed=1), mask_ratio=ratio)
        assert out.purified_pixel_values.min() >= 0 and out.purified_pixel_values.max() <= 1
        out.loss.backward()
        # None would make distributed training at mask ratio 0 hang or fail.
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_masked_pixels_do_not_reach_the_output():
    model, pixels = build(0.2), images(1)
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[0, 5] = True
    changed = pixels.clone()
    changed[:, :, 4:8, 4:8] = 0.0
    first = model(pixels, bool_masked_pos=masked).purified_pixel_values
    assert torch.equal(first, model(changed, bool_masked_pos=masked).purified_pixel_values)
    assert not torch.equal(first, model(changed).purified_pixel_values)


# ---------------------------------------------------------------- masks


def test_mask_ratio_default_depends_on_the_mode_and_zero_masks_nothing():
    model, pixels = build(0.2), images()
    assert model(pixels).mask.sum() == 0
    assert model.train()(pixels).mask.sum(dim=1).tolist() == [8, 8, 8]
    out = model(pixels, clean_pixel_values=pixels, mask_ratio=0)
    assert out.mask.sum() == 0 and out.reconstruction_loss == 0 and out.loss.isfinite()
    assert torch.equal(out.ids_restore, torch.arange(16).expand(3, 16))
    assert torch.equal(out.purified_pixel_values, model.eval()(pixels).purified_pixel_values)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_mask_keeps_the_lowest_noise_and_at_least_one_patch(ratio):
    noise = torch.rand(3, 16)
    out = build()(images(), mask_ratio=ratio, noise=noise)
    masked = min(round(16 * ratio), 15)
    assert out.mask.sum(dim=1).tolist() == [masked] * 3
    kept = noise.masked_fill(out.mask.bool(), -1).amax(dim=1)
    hidden = noise.masked_fill(~out.mask.bool(), 2).amin(dim=1)
    assert (kept < hidden).all()
    assert torch.equal((out.ids_restore >= 16 - masked).float(), out.mask)
    assert torch.equal(out.ids_restore.sort(dim=1).values, torch.arange(16).expand(3, 16))


def test_masks_are_reproducible():
    model, pixels = build(0.2), images()
    noise = torch.rand(3, 16)
    first = model(pixels, mask_ratio=0.5, noise=noise)
    second = model(pixels, mask_ratio=0.5, noise=noise)
    third = model(pixels, bool_masked_pos=first.mask.bool())
    assert torch.equal(first.purified_pixel_values, second.purified_pixel_values)
    assert torch.equal(first.purified_pixel_values, third.purified_pixel_values)
    draws = [model(pixels, mask_ratio=0.5, generator=torch.Generator().manual_seed(s)).mask for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_mask_arguments_are_checked():
    model, pixels = build(), images(2)
    uneven = torch.zeros(2, 16, dtype=torch.bool)
    uneven[0, 0] = True
    cases = [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"mask_ratio": -0.5}, "mask_ratio"),
        ({"noise": torch.rand(2, 15), "mask_ratio": 0.5}, "noise"),
        ({"bool_masked_pos": torch.zeros(1, 16, dtype=torch.bool)}, "bool_masked_pos"),
        ({"bool_masked_pos": uneven}, "same number"),
        ({"bool_masked_pos": torch.ones(2, 16, dtype=torch.bool)}, "at least one visible"),
        ({"bool_masked_pos": uneven, "noise": torch.rand(2, 16)}, "not both"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(pixels, **arguments)


def test_pixel_values_are_checked():
    model = build()
    cases = [
        (torch.rand(3, 16, 16), "shape"),
        (torch.rand(1, 1, 16, 16), "shape"),
        (torch.rand(1, 3, 16, 20), "purify"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "floating"),
    ]
    for pixels, message in cases:
        with pytest.raises(ValueError, match=message):
            model(pixels)
    with pytest.raises(ValueError, match="clean_pixel_values"):
        model(images(), clean_pixel_values=images(2))
    for call in (model, model.purify):
        with pytest.raises(TypeError, match="must be a tensor .*, got ndarray: MAEPImageProcessor"):
            call(images().numpy())


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("pixel_loss", ["l1", "l2", "charbonnier"])
def test_losses_are_what_the_docstring_says(pixel_loss):
    model = build(0.02, pixel_loss=pixel_loss, reconstruction_loss_weight=0.5, purification_loss_weight=3.0)
    pixels, clean = images() * 0.2 + 0.4, images(seed=1)
    out = model(pixels, clean_pixel_values=clean, mask_ratio=0.25, noise=torch.rand(3, 16))
    prediction = out.purified_pixel_values
    assert prediction.min() > 0 and prediction.max() < 1, "the reference below needs a prediction that is not clamped"
    hidden = out.mask.view(3, 1, 4, 1, 4, 1).expand(-1, 3, -1, 4, -1, 4).reshape(3, 3, 16, 16).bool()
    error = (prediction - clean).abs()
    visible = {"l1": error, "l2": error**2, "charbonnier": (error**2 + 1e-6).sqrt() - 1e-3}[pixel_loss][~hidden].mean()
    torch.testing.assert_close(out.reconstruction_loss, error[hidden].square().mean())
    torch.testing.assert_close(out.purification_loss, visible)
    torch.testing.assert_close(out.loss, 0.5 * error[hidden].square().mean() + 3.0 * visible)


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_micro_batches_average_to_the_batch(ratio):
    model = build(0.2)
    pixels, clean, noise = images(4), images(4, seed=1), torch.rand(4, 16)

    def loss(part):
        return model(pixels[part], clean[part], mask_ratio=ratio, noise=noise[part]).loss

    halves = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    torch.testing.assert_close(halves, loss(slice(0, 4)))


def test_the_loss_still_pulls_where_the_output_is_clamped():
    model = build(residual=False)
    with torch.no_grad():
        model.local_branch.head.bias.fill_(50.0)
    out = model(images(), clean_pixel_values=images(seed=1), mask_ratio=0)
    assert (out.purified_pixel_values == 1).all()
    out.loss.backward()
    assert model.local_branch.head.bias.grad.abs().min() > 0


# ---------------------------------------------------------------- positions, attention, outputs


def test_positions_are_distinct_and_interpolate_to_themselves():
    model = build()
    for part in (model.encoder, model.decoder):
        positions = part.position_embeddings[0]
        assert torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.1
    native = sincos_positions(4, 4, 32)
    assert torch.equal(native, sincos_positions(4, 4, 32, native=4))
    # The middle of every 2 x 2 block of a grid twice as fine: rows follow rows, columns follow columns.
    fine = sincos_positions(8, 12, 32, native=4).view(8, 12, 32)
    assert (fine[:, :, :16] == fine[:, :1, :16]).all() and (fine[:, :, 16:] == fine[:1, :, 16:]).all()
    # Pixel centres lie on each other: the middle one of three finer patches is where the native one is.
    threefold = sincos_positions(12, 12, 32, native=4).view(12, 12, 32)[1::3, 1::3]
    torch.testing.assert_close(threefold.reshape(1, 16, 32), native)


def test_interpolated_positions_take_rectangles():
    model = build(0.2)
    out = model(torch.rand(1, 3, 24, 40), interpolate_pos_encoding=True, mask_ratio=0.5)
    assert out.purified_pixel_values.shape == (1, 3, 24, 40) and out.mask.shape == (1, 60)
    grey = torch.full((1, 3, 24, 40), 0.5)  # its patches differ in their positions alone
    seen = model(grey, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[0]
    expected = sincos_positions(6, 10, 32, native=4)
    torch.testing.assert_close(seen - seen[:, :1], expected - expected[:, :1], atol=1e-5, rtol=0)
    pixels = images()
    native = model(pixels).purified_pixel_values
    assert torch.equal(native, model(pixels, interpolate_pos_encoding=True).purified_pixel_values)
    with pytest.raises(ValueError, match="multiples of patch_size"):
        model(torch.rand(1, 3, 18, 16), interpolate_pos_encoding=True)


def test_eager_equals_sdpa():
    model, pixels = build(0.2), images()
    model.set_attn_implementation("sdpa")
    sdpa = model(pixels, mask_ratio=0.5, noise=torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
    model.set_attn_implementation("eager")
    eager = model(pixels, mask_ratio=0.5, noise=torch.rand(3, 16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(sdpa.purified_pixel_values, eager.purified_pixel_values, rtol=0, atol=1e-5)


def test_hidden_states_attentions_and_tuples():
    model, pixels = build(0.2), images()
    out = model(pixels, mask_ratio=0.5, output_hidden_states=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(3, 8, 32)] * 3
    with pytest.raises(ValueError, match="eager"):
        model(pixels, output_attentions=True)
    model.set_attn_implementation("eager")
    attentions = model(pixels, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(3, 2, 16, 16)] * 2
    torch.testing.assert_close(attentions[0].sum(dim=-1), torch.ones(3, 2, 16))
    values = model(pixels, return_dict=False)
    assert isinstance(values, tuple) and len(values) == 3 and torch.equal(values[0], model(pixels)[0])


def test_dropout_follows_the_mode_unless_told():
    model, pixels = build(0.2, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5), images()
    evaluated = model(pixels).purified_pixel_values
    model.train()
    assert not torch.equal(model(pixels, mask_ratio=0).purified_pixel_values, evaluated)
    assert torch.equal(model(pixels, mask_ratio=0, deterministic=True).purified_pixel_values, evaluated)


# ---------------------------------------------------------------- dtypes, checkpointing, compilation


def test_bfloat16_weights_take_float32_and_bfloat16_images():
    reference, pixels = build(0.05), images()
    expected = reference(pixels).purified_pixel_values
    model = build(0.05).to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        out = model(pixels.to(dtype), clean_pixel_values=pixels.to(dtype), mask_ratio=0.5)
        assert out.purified_pixel_values.dtype == dtype and out.loss.isfinite()
        out = model(pixels.to(dtype)).purified_pixel_values
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)
    untrained = build().to(torch.bfloat16)
    assert torch.equal(untrained(pixels).purified_pixel_values, pixels), "the identity must not round to bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = reference(pixels, clean_pixel_values=pixels, mask_ratio=0.5)
    assert out.purified_pixel_values.dtype == torch.float32 and out.loss.isfinite()


@pytest.mark.parametrize("options", [{}, {"mode": "interpolate"}, {"mask_ratio": 0.5}])
@pytest.mark.parametrize("size", [16, 21])
@pytest.mark.parametrize("form", FORMS)
def test_images_of_16_bits_are_rounded_once(form, size, options):
    model = build(0.05, **form)
    for dtype in (torch.bfloat16, torch.float16):
        pixels = images(size=size).to(dtype)
        found, expected = (
            model.purify(each, generator=torch.Generator().manual_seed(0), **options)
            for each in (pixels, pixels.float())
        )
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_empty_batch_gives_an_empty_one(form, attention):
    model, pixels = build(0.2, **form), images(0)
    model.set_attn_implementation(attention)
    hidden = {"bool_masked_pos": torch.ones(0, 16, dtype=torch.bool)}
    for options in ({}, {"mask_ratio": 0.5}, hidden, {"interpolate_pos_encoding": True}):
        out = model(pixels, clean_pixel_values=pixels, **options)
        assert out.purified_pixel_values.shape == pixels.shape
        assert out.mask.shape == out.ids_restore.shape == (0, 16)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant):
    model = build(0.2).train()
    pixels, noise = images().requires_grad_(), torch.rand(3, 16)

    def gradients():
        model.zero_grad()
        model(pixels, clean_pixel_values=images(seed=1), noise=noise).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    handle = model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients()
    handle.remove()
    assert len(calls) == 2, "the block must have been computed again in the backward pass"
    for first, second in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(first, second)


@compiled
@pytest.mark.parametrize("form", [{}, {"local_branch_layers": 0, "residual": False}])
def test_compiles_without_graph_breaks(form):
    torch._dynamo.reset()
    model, pixels, noise = build(0.2, **form), images(), torch.rand(3, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for arguments in ({}, {"clean_pixel_values": pixels, "mask_ratio": 0.5, "noise": noise}):
        expected, out = model(pixels, **arguments), compiled(pixels, **arguments)
        torch.testing.assert_close(out.purified_pixel_values, expected.purified_pixel_values)
    model.train()
    torch.compile(model, backend="eager", fullgraph=True)(pixels, clean_pixel_values=pixels).loss.backward()


@compiled
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("size", [16, 40])
def test_purify_can_be_traced(size):
    class Purify(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model.purify(pixels)

    pixels = images(size=size)
    with torch.no_grad():
        module = Purify(build(0.2))
        traced = torch.jit.trace(module, pixels)
        torch.testing.assert_close(traced(pixels.flip(0)), module(pixels.flip(0)))


def test_exports_with_any_batch_size():
    model, pixels = build(0.2), images(2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (pixels,), dynamic_shapes={"pixel_values": {0: batch}})
    for size in (2, 5):
        out = program.module()(images(size, seed=size)).purified_pixel_values
        torch.testing.assert_close(out, model(images(size, seed=size)).purified_pixel_values)


@compiled
@pytest.mark.parametrize("options", [{}, {"mode": "interpolate"}, {"window_batch_size": 3}])
@pytest.mark.parametrize("size", [16, 21])
def test_purify_exports_with_any_batch_size(size, options):
    class Purify(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build(0.2)

        def forward(self, pixels):
            return self.model.purify(pixels, **options)

    module = Purify().eval()
    shapes = {"pixels": {0: torch.export.Dim("batch")}}
    program = torch.export.export(module, (images(4, size=size),), dynamic_shapes=shapes).module()
    for count in (1, 2, 9):
        pixels = images(count, size=size, seed=count)
        torch.testing.assert_close(program(pixels), module(pixels))


def test_one_channel():
    model = build(0.1, num_channels=1)
    assert model(images(channels=1)).purified_pixel_values.shape == (3, 1, 16, 16)
