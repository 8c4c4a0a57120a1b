"""Mutants of w2v-BERT. Items are those of specs/indextts2.md 9; 0 stands for what the sheet does not number."""
FILE = "models/codecs/w2vbert.py"
LIVE = "tests/test_w2vbert.py -k transformers"
REST = "tests/test_w2vbert.py"


def m(item, old, new, test=LIVE):
    return item, FILE, old, new, test


MUTANTS = [
    m(11, "for _ in range(layers))", "for _ in range(layers - 1))"),
    m(11, "for _ in range(layers))", "for _ in range(layers + 1))"),
    m(11, "layers=17, device", "layers=16, device", REST),
    m(11, "x = F.pad(x.transpose(1, 2), (past, 0))", "x = F.pad(x.transpose(1, 2), (past // 2,) * 2)"),
    m(11, ".clamp(-self.left, self.right)", ".clamp(-self.right, self.left)"),
    m(11, ".clamp(-self.left, self.right) + self.left", ".clamp(-self.left, self.right) + self.right"),
    m(11, "rows = at - at[:, None]", "rows = at[:, None] - at"),
    m(11, "weight.T * scale", "weight.T"),
    m(11, "attn_mask=bias", "attn_mask=None"),
    m(11, "x = x + 0.5 * self.ffn1(self.ffn1_layer_norm(x))", "x = x + self.ffn1(self.ffn1_layer_norm(x))"),
    m(11, "x = x + 0.5 * self.ffn2(self.ffn2_layer_norm(x))", "x = x + self.ffn2(self.ffn2_layer_norm(x))"),
    m(11, "return self.final_layer_norm(x)", "return x"),
    m(11, "self.ffn1 = FeedForward(width, size.inner, F.silu)", "self.ffn1 = FeedForward(width, size.inner, F.gelu)"),
    m(11, "x = F.silu(self.depthwise_layer_norm(", "x = F.relu(self.depthwise_layer_norm("),
    m(11, "x = F.glu(x, -1)", "x = F.glu(x.roll(x.shape[-1] // 2, -1), -1)"),
    m(11, "x = x + self.conv_module(x, mask)", "x = self.conv_module(x, mask)"),
    m(11, "x = x * mask[..., None]\n        x = F.linear", "x = x\n        x = F.linear"),
    m(11, "x = x * mask[..., None]\n        rows", "x = x\n        rows"),
    m(11, "bias = bias.masked_fill_(~mask[:, None, None], float(\"-inf\"))", "bias = bias"),
    m(11, "x = self.layer_norm(x)\n        if mask", "if mask"),
    (11, "models/parts/layers.py", "return self.projection(self.layer_norm(x))", "return self.projection(x)", LIVE),
    m(0, "need(config, \"layer_norm_eps\", float, 1e-5, at_least=0)", "1e-5", "tests/test_w2vbert.py -k eps"),
    m(0, "\"layer_norm_eps\", float, 1e-5", "\"layer_norm_eps\", float, 1e-6", "tests/test_w2vbert.py -k eps"),
    (0, "models/parts/layers.py", "self.layer_norm = nn.LayerNorm(features, eps)", "self.layer_norm = nn.LayerNorm(features, 1e-6)", LIVE),
    m(0, "self.depthwise_layer_norm = nn.LayerNorm(width, eps)", "self.depthwise_layer_norm = nn.LayerNorm(width, 1e-6)", "tests/test_w2vbert.py -k eps"),
    m(0, "with exact(self.device):", "if True:", "tests/test_w2vbert.py -k rounded"),
    m(29, "heads=width // head_size", "heads=1"),
    m(29, "if held < layers:", "if False:", "tests/test_w2vbert.py -k said"),
    m(29, "if left + right + 1 != distances:", "if False:", "tests/test_w2vbert.py -k said"),
    m(11, "if lengths is not None and min(lengths) < T:", "if False:"),
]
