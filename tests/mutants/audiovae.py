"""One-line faults in the codec, after section 9 of the sheet: odd strides, weight norm's axis, epsilon, padding, state."""
FILE, TESTS = "models/codecs/audiovae.py", "tests/test_audiovae.py"
MUTANTS = [
    ("V1 pads odd strides as V2", FILE, "2 * math.ceil(s / 2) if odd_stride_extra_pad else s", "s", TESTS),
    ("snake without epsilon", FILE, "self.alpha + 1e-9)", "self.alpha)", TESTS),
    ("snake's sine not squared", FILE, ".sin_().square_()", ".sin_()", TESTS),
    ("padding on the right", FILE, "x = torch.cat([before, x], dim=2)", "x = torch.cat([x, before], dim=2)", TESTS),
    ("upsampling without its second stride", FILE, "taps[:, :, 0, :, 1:] + taps[:, :, 1, :, :-1]", "taps[:, :, 0, :, 1:]", TESTS),
    ("upsampling forgets its last input", FILE, "B, C, T = x.shape\n        before = past.get(self)", "B, C, T = x.shape\n        before = None", TESTS),
    ("stream forgets", FILE, "past[self] = x[:, :, -self.left:]", "past[self] = 0 * x[:, :, -self.left:]", TESTS),
    ("stream keeps views", FILE, "tail.clone() for layer", "tail for layer", TESTS),
    ("first decoder convolution not depthwise", FILE, "Conv(latent_dim, latent_dim, 7, groups=latent_dim)", "Conv(latent_dim, latent_dim, 7)", "tests/test_voxcpm.py"),
    ("no tanh", FILE, "return torch.tanh(z)", "return z", TESTS),
    ("rate on an edge goes up", FILE, "> edge for edge", ">= edge for edge", TESTS),
    ("condition after its layer", FILE, "boundaries:\n                conditions[str(len(layers))]", "boundaries:\n                conditions[str(len(layers) + 1)]", TESTS),
    ("published norm over the output axis", FILE, "tensor.flatten(1).norm(dim=1)[:, None, None]", "tensor.norm()[None, None, None].expand(len(tensor), 1, 1).clone()", TESTS),
    ("encoder pads on the left", FILE, "F.pad(x, (0, -n % self.hop))", "F.pad(x, (-n % self.hop, 0))", TESTS),
]
