"""Mutants of the Higgs tokenizer. Items are those of specs/higgs.md 9; 0 stands for what the sheet does not number."""
FILE = "models/codecs/higgs_codec.py"
GOLDEN = "tests/test_higgs_codec.py -k original"
HUBERT = "tests/test_higgs_codec.py -k transformers"
BATCH = "tests/test_higgs_codec.py -k unequal"
PIECES = "tests/test_higgs_codec.py -k pieces"
WINDOWS = "tests/test_higgs_codec.py -k windows"
ERRORS = "tests/test_higgs_codec.py -k said"


def m(item, old, new, test=GOLDEN):
    return item, FILE, old, new, test


MUTANTS = [
    # HuBERT: 13 states, no normalisation of the input, 160 zeros, every second frame
    m(11, "total = x[:, ::step].clone()", "total = torch.zeros_like(x[:, ::step])"),
    m(11, "total / (len(self.encoder.layers) + 1)", "total / len(self.encoder.layers)"),
    m(11, "x = x[:, None]\n        for layer", "x = F.layer_norm(x, x.shape[-1:])[:, None]\n        for layer"),
    m(11, "SEMANTIC_PAD = 160", "SEMANTIC_PAD = 0"),
    m(11, "SEMANTIC_PAD = 160", "SEMANTIC_PAD = 159"),
    m(11, "total += x[:, ::step]", "total += x[:, : total.shape[1]]"),
    m(11, "// (c.sample_rate * c.downsample_factor)", "// (2 * c.sample_rate * c.downsample_factor)"),
    m(11, "x = x + self.encoder.pos_conv_embed", "x = self.encoder.pos_conv_embed"),
    m(11, "self.conv(x, mask)[..., : x.shape[-1]]", "self.conv(x, mask)[..., -x.shape[-1] :]"),
    m(11, "y = F.gelu(y)", "y = y"),
    m(11, "return F.gelu(x)\n", "return F.gelu(x, approximate=\"tanh\")\n"),
    m(11, "FeedForward(width, inner, F.gelu)", "FeedForward(width, inner, F.relu)"),
    m(11, "norm=i == 0)", "norm=False)"),
    m(11, "nn.GroupNorm(out_channels, out_channels)", "nn.GroupNorm(1, out_channels)"),
    m(11, "nn.GroupNorm(out_channels, out_channels)", "nn.GroupNorm(out_channels, out_channels, eps=1e-6)"),
    m(11, "x = self.layer_norm(x + self.attention(x, mask))", "x = x + self.attention(self.layer_norm(x), mask)"),
    m(11, "return self.final_layer_norm(x + self.feed_forward(x))", "return x + self.feed_forward(self.final_layer_norm(x))"),
    m(11, "x = self.encoder.layer_norm(x)\n", "pass\n"),
    m(11, "eps=need(told, \"layer_norm_eps\", float, 1e-5, at_least=0)", "eps=1e-5", HUBERT),
    m(11, "\"layer_norm_eps\", float, 1e-5", "\"layer_norm_eps\", float, 1e-6"),
    m(11, "need(told, \"num_attention_heads\", int, 12, at_least=1)", "12", HUBERT),
    m(11, "\"num_attention_heads\", int, 12", "\"num_attention_heads\", int, 8"),
    (11, "models/parts/layers.py", "self.layer_norm = nn.LayerNorm(features, eps)", "self.layer_norm = nn.LayerNorm(features, 1e-6)", HUBERT),
    # DAC
    m(12, "return in_pieces(tail, x", "return in_pieces(lambda x, _: tail(x, _).tanh(), x", HUBERT),
    m(12, "output_padding=stride % 2", "output_padding=0"),
    m(12, "1 / (alpha + 1e-9)", "1 / (1 + 1e-9)"),
    m(12, "(x * alpha).sin_()", "x.sin()"),
    m(12, ".sin_().square_()", ".sin_()"),
    m(12, "padding=3 * dilation, dilation=dilation", "padding=3"),
    m(12, "self.res_unit2 = ResidualUnit(channels, 3)", "self.res_unit2 = ResidualUnit(channels, 1)"),
    m(12, "self.res_unit3 = ResidualUnit(out_channels, 9)", "self.res_unit3 = ResidualUnit(out_channels, 3)"),
    m(12, "return self.conv2(y).add_(x)", "return self.conv2(y)"),
    m(12, "2 * stride, stride, padding=math.ceil(stride / 2))", "2 * stride, stride, padding=stride // 2)"),
    m(12, "padding = math.ceil(stride / 2)", "padding = stride // 2"),
    # weight norm
    (13, "models/parts/checkpoint.py", "if size == 1]", "if i]", GOLDEN),
    (13, "models/parts/checkpoint.py", "dim=axes, keepdim=True", "dim=0, keepdim=True", GOLDEN),
    (14, "models/parts/checkpoint.py", "return g.load().float() * v /", "return v /", GOLDEN),
    # the repair
    m(15, "self.repair = SEMANTIC_PAD * ratio", "self.repair = self.hop // 2"),
    m(15, "self.repair = SEMANTIC_PAD * ratio", "self.repair = 0"),
    m(15, "self.repair = SEMANTIC_PAD * ratio", "self.repair = 320", "tests/test_higgs_codec.py -k whole_tokenizer"),
    m(15, "self.step = max(1, ratio)", "self.step = ratio", "tests/test_higgs_codec.py -k widths"),
    m(15, "padded[i, 0, 0, pad : pad + n]", "padded[i, 0, 0, :n]"),
    m(15, "pad = 0 if agree else self.repair", "pad = 0"),
    # semantic branch and quantiser
    m(0, "y = self.conv1(F.elu(x), mask)", "y = self.conv1(x, mask)"),
    m(0, "return self.conv2(F.elu(y)) + x", "return self.conv2(F.elu(y))"),
    m(0, "return self.conv2(F.elu(y)) + x", "return self.conv2(F.gelu(y)) + x"),
    m(0, "torch.cat([acoustic[..., :T], semantic[..., :T]], 1)", "torch.cat([semantic[..., :T], acoustic[..., :T]], 1)"),
    m(0, "distances = rows.square().sum(1) - products", "distances = 0 - products"),
    m(0, "products = 2 * self.project_in(x)", "products = 1 * self.project_in(x)"),
    m(0, "distances.argmin(-1)", "distances.argmax(-1)"),
    m(0, "x = x - stage.decode(codes[-1])", "x = x"),
    m(0, "x = x - stage.decode(codes[-1])", "x = stage.decode(codes[-1])"),
    m(23, "return self.fc(both), frames", "return self.fc(both).bfloat16().float(), frames"),
    m(23, "with exact(self.device):\n            states", "if True:\n            states", "tests/test_higgs_codec.py -k rounded"),
    m(23, "with exact(self.device):\n            return self.acoustic_encoder", "if True:\n            return self.acoustic_encoder",
      "tests/test_higgs_codec.py -k rounded"),
    m(23, "with exact(self.device):\n            wav", "if True:\n            wav", "tests/test_higgs_codec.py -k rounded"),
    # what shares a batch
    m(0, "x = x if mask is None else x * mask", "x = x", BATCH),
    m(0, "full = all(n == x.shape[-1] for n in lengths)", "full = True", BATCH),
    m(0, "x = layer(x, keys)", "x = layer(x, None)", BATCH),
    m(0, "heard = heard * mask[:, 0, 0]", "heard = heard", BATCH),
    m(0, "x = block(x, valid_mask(size, x.shape[-1], x.device))", "x = block(x, None)", BATCH),
    m(0, "return self.conv2(self.snake1(x), mask)", "return self.conv2(self.snake1(x))", BATCH),
    m(0, "self.encoder_semantic(states.transpose(1, 2)[:, :, None], mask)", "self.encoder_semantic(states.transpose(1, 2)[:, :, None], None)", BATCH),
    m(0, "return self.conv(x, mask)\n", "return self.conv(x)\n", BATCH),
    m(0, "self.conv1(self.snake1(x), mask)\n\n\nclass Encoder(", "self.conv1(self.snake1(x))\n\n\nclass Encoder(", BATCH),
    # pieces, windows, streams
    m(0, "REACH = 3 * (1 + 3 + 9)", "REACH = 3 * (1 + 3)", PIECES),
    m(0, "math.ceil((3 + REACH + 2 * stride) / stride) * stride", "math.ceil(REACH / 2 / stride) * stride", PIECES),
    m(0, "math.ceil((3 + REACH) / stride) + 2", "math.ceil(REACH / 2 / stride)", PIECES),
    m(0, "None if mask is None else mask[..., start:end]", "None", BATCH),
    m(0, "skip = (first - start) // pieces.down * pieces.up", "skip = 0", PIECES),
    m(0, "return 3 - first, last + 3", "return 0 - first, last + 3", WINDOWS),
    m(0, "return 3 - first, last + 3", "return 3 - first, last", WINDOWS),
    m(0, "max(0, first - before)", "first", WINDOWS),
    m(0, "last + after)", "last)", WINDOWS),
    m(0, "self._until(known - after)", "self._until(known)", WINDOWS),
    m(16, "if not 0 <= low <= high < self.bins:", "if False:", ERRORS),
]
