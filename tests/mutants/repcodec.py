"""Mutants of RepCodec. Items are those of specs/indextts2.md 9; 0 stands for what the sheet does not number."""
FILE = "models/codecs/repcodec.py"
GOLDEN = "tests/test_repcodec.py -k original"
BATCH = "tests/test_repcodec.py -k padded"


def m(item, old, new, test=GOLDEN):
    return item, FILE, old, new, test


MUTANTS = [
    m(13, "F.normalize(self.codebook.weight, dim=-1)", "self.codebook.weight"),
    m(13, "rows = self.codebook(codes)", "rows = F.normalize(self.codebook(codes), dim=-1)"),
    m(13, ".T).argmax(-1)", ".T).argmin(-1)"),
    (13, "models/parts/checkpoint.py", "if size == 1]", "if i > 1]", GOLDEN),
    (13, "models/parts/checkpoint.py", "dim=axes, keepdim=True", "dim=0, keepdim=True", GOLDEN),
    (13, "models/parts/checkpoint.py", "return g.load().float() * v /", "return v /", GOLDEN),
    m(0, "with exact(self.device):", "if True:", "tests/test_repcodec.py -k rounded"),
    m(0, "EPS = 1e-6", "EPS = 1e-5"),
    m(0, "F.gelu(self.pwconv1(y))", "F.gelu(self.pwconv1(y), approximate=\"tanh\")"),
    m(0, "self.gamma * self.pwconv2", "self.pwconv2"),
    m(0, "return x + y.transpose(1, 2)", "return y.transpose(1, 2)"),
    m(0, "x = self.norm(x.transpose(1, 2)).transpose(1, 2)\n", "pass\n"),
    m(0, "return self.final_layer_norm(x.transpose(1, 2))", "return x.transpose(1, 2)"),
    m(0, "y = self.norm(self.dwconv(masked(x, mask)).transpose(1, 2))", "y = self.dwconv(masked(x, mask)).transpose(1, 2)"),
    m(0, "padding=kernel // 2, groups=width", "padding=\"same\", padding_mode=\"replicate\", groups=width"),
    m(0, "padding=size.kernel // 2)", "padding=size.kernel // 2, padding_mode=\"replicate\")"),
    m(0, "for block in self.convnext:", "for block in self.convnext[1:]:"),
    m(0, "self.dwconv(masked(x, mask))", "self.dwconv(x)", BATCH),
    m(0, "self.embed(masked(x.transpose(1, 2), mask))", "self.embed(x.transpose(1, 2))", BATCH),
    m(0, "return self.quantizer.quantizers[0].decode(codes.to(self.device))",
      "return self.quantizer.quantizers[0].decode(codes.to(self.device)[:1]).expand(len(codes), -1, -1)", "tests/test_repcodec.py -k every_row"),
    m(0, "layers=len(blocks)", "layers=1", "tests/test_repcodec.py"),
    m(0, "if lowest < 0 or highest >= self.bins:", "if False:", "tests/test_repcodec.py -k said"),
]
