"""Few-bit weights, measures of speech, sentences: breaks that the numbers must notice."""


def of(file, test, *breaks):
    return [(item, f"models/parts/{file}.py", old, new, f"tests/test_{test or file}.py") for item, old, new in breaks]


MUTANTS = [
    *of("quant", None,
        ("rows share a scale", "weight.abs().amax(1, keepdim=True) / 127", "weight.abs().amax() / 127"),
        ("127 or 128", "amax(1, keepdim=True) / 127)", "amax(1, keepdim=True) / 128)"),
        ("blocks share a scale", "scale = flat.abs().amax(1, keepdim=True)", "scale = flat.abs().amax()"),
        ("nibbles the other way", "codes[:, 0::2] << 4 | codes[:, 1::2]", "codes[:, 1::2] << 4 | codes[:, 0::2]"),
        ("block of the wrong size", "BLOCK = 64 ", "BLOCK = 128 "),
        ("backward with another weight", "gradient @ weight_of(ctx.layer, gradient.dtype)", "gradient @ (weight_of(ctx.layer, gradient.dtype) * 1.01)"),
        ("weight kept for backward", "ctx.layer = layer\n", "ctx.layer = layer\n        ctx.save_for_backward(weight_of(layer, x.dtype))\n"),
        ("bias forgotten", "return y if self.bias is None else y + self.bias.to(x.dtype)", "return y")),
    *of("measures", None,
        ("octave below", "if not len(below):\n        return None\n    at = int(below[0])", "if not len(below):\n        return None\n    at = int(below[-1])"),
        ("no refinement", "return at + 1 + _vertex(row, at)", "return at + 1"),
        ("not divided by the mean", "difference[:, 1:] * lags / sums", "difference[:, 1:] / difference[:, 1:].amax(1, keepdim=True)"),
        ("path of one kind", "before = (i - 1, j - 1), (i - 1, j), (i, j - 1)", "before = (i - 1, j - 1), (i - 1, j - 1), (i, j - 1)"),
        ("level in the cepstrum", "order = torch.arange(1, CEPSTRA + 1", "order = torch.arange(0, CEPSTRA"),
        ("substitutions free", "diagonal + (item != other)", "diagonal")),
    *of("sentences", None,
        ("abbreviations end", "if follows and (word in ABBREVIATIONS", "if follows and (False"),
        ("initials end", "return not (initial and follows) and not", "return not"),
        ("blanks lost", "out.append(text[begin:at])", "out.append(text[begin:at].strip())"),
        ("quotes apart", 'text[at] in PLAIN + STRONG + CLOSING:', 'text[at] in PLAIN + STRONG:'),
        ("accents apart", "at -= 1  # an accent", "break  # an accent")),
    *of("page", "validate",
        ("pictures without a filter byte", "torch.nn.functional.pad(grey, (1, 0))", "torch.nn.functional.pad(grey, (0, 1))")),
    *[(item, "validate.py", old, new, "tests/test_validate.py -k " + test) for item, old, new, test in (
        ("difference of nothing", "return float((a - b).abs().mean() / b.abs().mean().clamp(min=1e-12))", "return 1.0", "compared_with"),
        ("codes compared as a whole", "return float((a != b).double().mean())", "return 1.0", "compared_with"),
        ("losses by batches", "means = {name: value / max(counts[name], 1) for name, value in sums.items()}",
         "means = {name: value / len(order) for name, value in sums.items()}", "one_batch"),
        ("strength ignored", "update = float(module.lora_scale) *", "update = float(module.lora_full_scale) *", "size_of_an_update"),
        ("ties by name", "(score(column), column.step)", "(score(column), -column.step)", "ties"),
        ("files unchecked", "wrong = checkpoint.check_step(path)", "wrong = None", "damage"),
        ("NaN passes", 'if not value.isfinite().all()]', "if False]", "damage"),
        ("seed not in the key", '"speaker", "seed", "retries"', '"speaker", "retries"', "same_command"),
    )],
]
