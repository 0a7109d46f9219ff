"""Trains a small language model on real text with jax_fa3 attention: the project's main job.

The text is the source of Python's own standard library, read as bytes, so nothing is downloaded.
The model is a decoder-only transformer (RMSNorm, rotary positions, grouped query heads, SwiGLU).
Attention runs under jit, grad and scan, and again with a key/value cache when the trained model
writes its sample.

    python examples/train_lm.py                     # two CPU cores, under three minutes
    python examples/train_lm.py --preset=h200       # one Hopper GPU: bfloat16, context 4096
    python examples/train_lm.py --attention=jax_nn  # the same run with jax.nn's attention

The process exits with status 1 when the first steps with jax_fa3 and with
jax.nn.dot_product_attention do not give the same losses and gradient norms.

Letters: B batch, T tokens, M model dim, N query heads, K key/value heads, H head dim, V vocabulary.
"""

import dataclasses
import functools
import json
import math
import pathlib
import platform
import sys
import sysconfig
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import app, flags, logging

import jax_fa3

VOCABULARY = 256  # bytes

# Directories that hold no library source: installed packages, test suites, generated tables.
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    | {"__pycache__", "__phello__"}
)
VALIDATION_STRIDE = 20  # every 20th file is held out, so both splits hold whole files


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run. Every field is a flag of the same name; a preset fills those that are not given."""

    dtype: str = "float32"  # of activations; parameters and the optimiser stay float32
    layers: int = 4
    model_dim: int = 128
    query_heads: int = 2
    key_value_heads: int = 1
    head_dim: int = 64
    seq_len: int = 128
    batch_size: int = 8
    steps: int = 600
    learning_rate: float = 4e-3
    remat: bool = False
    max_train_seconds: float = 100.0
    sample_bytes: int = 500


PRESETS = {
    "cpu": Settings(),
    # Context long enough that attention matters, and a model that fills the GPU. Remat keeps the
    # attention outputs (jax_fa3.remat_policy) and recomputes the rest of a layer.
    "h200": Settings(
        dtype="bfloat16",
        layers=12,
        model_dim=1024,
        query_heads=8,
        key_value_heads=4,
        head_dim=128,
        seq_len=4096,
        batch_size=8,
        steps=600,
        learning_rate=2e-3,
        remat=True,
        max_train_seconds=150.0,
        sample_bytes=1500,
    ),
}

ATTENTION_CHOICES = {
    "auto": "jax_fa3 chooses: its Hopper kernels where they can run, else its xla path",
    "fa3": "jax_fa3's Hopper kernels, or an error that says why not",
    "xla": "jax_fa3's pure JAX path",
    "jax_nn": "jax.nn.dot_product_attention, XLA",
    "cudnn": "jax.nn.dot_product_attention, cuDNN",
}

_PRESET = flags.DEFINE_enum("preset", "cpu", sorted(PRESETS), "Defaults of the flags below.")
_ATTENTION = flags.DEFINE_enum(
    "attention",
    "auto",
    list(ATTENTION_CHOICES),
    "; ".join(f"{name}: {meaning}" for name, meaning in ATTENTION_CHOICES.items()),
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters, batches and the sample.")
_COMPARE_STEPS = flags.DEFINE_integer(
    "compare_steps", 8, "First steps to repeat with the other attention; 0 skips the comparison."
)
_PROMPT = flags.DEFINE_string("prompt", "def ", "What the sample starts with.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.6, "Of the sample; 0 takes the likeliest byte.")
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", "demo", "Where train_lm.png (loss curve) and train_lm.json go."
)
_HELP = {
    "dtype": "Activations: float32, bfloat16 or float16.",
    "layers": "Transformer layers.",
    "model_dim": "Width of the residual stream.",
    "query_heads": "Query heads.",
    "key_value_heads": "Key/value heads; divides query_heads.",
    "head_dim": "Width of a head; the Hopper kernels take 64, 128 and 256.",
    "seq_len": "Bytes of context.",
    "batch_size": "Sequences a step.",
    "steps": "Training steps.",
    "learning_rate": "Peak of AdamW's learning rate.",
    "remat": "Recompute layers in the backward pass, but for the attention outputs.",
    "max_train_seconds": "End training after this long, annealed; 0 is no limit.",
    "sample_bytes": "Bytes to write after training.",
}


def _define_settings_flags():
    """Defines one flag for each field of Settings; None means the preset's value."""
    define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
    for field in dataclasses.fields(Settings):
        help_text = f"{_HELP[field.name]} (default: the preset's; cpu: {field.default})"
        define.get(type(field.default), flags.DEFINE_string)(field.name, None, help_text)


_define_settings_flags()


def settings_from_flags():
    """The preset with the flags that were given laid over it.

    Raises:
      app.UsageError: for settings that do not fit together, all of them at once.
    """
    given = {
        field.name: flags.FLAGS[field.name].value
        for field in dataclasses.fields(Settings)
        if flags.FLAGS[field.name].value is not None
    }
    settings = dataclasses.replace(PRESETS[_PRESET.value], **given)
    problems = []
    if settings.dtype not in ("float32", "bfloat16", "float16"):
        problems.append(f"--dtype={settings.dtype}: expected float32, bfloat16 or float16")
    for name in ("layers", "model_dim", "query_heads", "key_value_heads", "seq_len", "batch_size"):
        if getattr(settings, name) < 1:
            problems.append(f"--{name}={getattr(settings, name)}: expected at least 1")
    if settings.steps < 2:
        problems.append(f"--steps={settings.steps}: expected at least 2")
    if settings.key_value_heads > 0 and settings.query_heads % settings.key_value_heads:
        problems.append(
            f"--key_value_heads={settings.key_value_heads}: "
            f"expected a divisor of --query_heads={settings.query_heads}"
        )
    if settings.head_dim < 2 or settings.head_dim % 2:
        problems.append(
            f"--head_dim={settings.head_dim}: expected an even number (rotary positions turn pairs)"
        )
    if problems:
        raise app.UsageError("\n".join(problems))
    return settings


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def read_standard_library():
    """The standard library's source as (train, validation), each a uint8 array.

    Files come in the order of their relative paths, so one Python version gives one split.

    Raises:
      FileNotFoundError: this Python carries no readable source (a zipped or frozen library).
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not SKIPPED_DIRECTORIES.intersection(path.relative_to(root).parts[:-1])
    )
    if len(paths) < 2 * VALIDATION_STRIDE:
        raise FileNotFoundError(
            f"{root} holds {len(paths)} Python files; expected the standard library's source"
        )
    train, validation = [], []
    for index, (_, path) in enumerate(paths):
        held_out = index % VALIDATION_STRIDE == VALIDATION_STRIDE - 1
        (validation if held_out else train).append(path.read_bytes())
    logging.info("Text: %d files of %s", len(paths), root)
    return tuple(np.frombuffer(b"\n".join(part), dtype=np.uint8) for part in (train, validation))


def unigram_entropy(text):
    """Nats a byte of the best model that ignores context: what learning has to beat."""
    counts = np.bincount(text, minlength=VOCABULARY)
    share = counts[counts > 0] / text.size
    return float(-(share * np.log(share)).sum())


def random_windows(text, settings, seed):
    """[B, T + 1] windows of the text, a function of the seed (a tuple of integers) alone."""
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, text.size - settings.seq_len, settings.batch_size)
    return text[starts[:, None] + np.arange(settings.seq_len + 1)]


# --------------------------------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------------------------------


def make_attention(name):
    """An attention function (query, key, value, query_offset) -> [B, T, N, H], always causal.

    `query_offset` is None while training. With a key/value cache it is the key position of the
    first query: a traced integer.
    """
    if name in ("auto", "fa3", "xla"):
        return functools.partial(
            _attention_jax_fa3, implementation=None if name == "auto" else name
        )
    return functools.partial(
        _attention_jax_nn, implementation={"jax_nn": "xla", "cudnn": "cudnn"}[name]
    )


def _attention_jax_fa3(query, key, value, query_offset=None, *, implementation):
    return jax_fa3.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        query_offset=query_offset,
        implementation=implementation,
    )


def _attention_jax_nn(query, key, value, query_offset=None, *, implementation):
    if query_offset is None:
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation=implementation
        )
    # jax.nn has no query_offset: the diagonal becomes a dense mask, which is small here.
    positions = query_offset + jnp.arange(query.shape[1])
    mask = jnp.arange(key.shape[1])[None, :] <= positions[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])


def initial_parameters(settings, seed):
    """Float32 parameters; those of the layers are stacked on a leading axis for `lax.scan`."""
    model, heads, kv_heads = settings.model_dim, settings.query_heads, settings.key_value_heads
    head, hidden = settings.head_dim, mlp_dim(settings)
    keys = iter(jax.random.split(jax.random.key(seed), 9))

    def weights(*shape, fan_in, gain=1.0):
        return jax.random.normal(next(keys), shape) * (gain / math.sqrt(fan_in))

    layers = settings.layers
    residual_gain = 1 / math.sqrt(2 * layers)  # keeps the residual stream's scale at any depth
    return {
        "embedding": weights(VOCABULARY, model, fan_in=1, gain=0.5),
        "layers": {
            "attention_norm": jnp.ones((layers, model)),
            "query": weights(layers, model, heads, head, fan_in=model),
            "key": weights(layers, model, kv_heads, head, fan_in=model),
            "value": weights(layers, model, kv_heads, head, fan_in=model),
            "out": weights(layers, heads, head, model, fan_in=heads * head, gain=residual_gain),
            "mlp_norm": jnp.ones((layers, model)),
            "gate": weights(layers, model, hidden, fan_in=model),
            "up": weights(layers, model, hidden, fan_in=model),
            "down": weights(layers, hidden, model, fan_in=hidden, gain=residual_gain),
        },
        "final_norm": jnp.ones(model),
        "logits": weights(model, VOCABULARY, fan_in=model, gain=0.1),
    }


def mlp_dim(settings):
    """Width of the gated MLP: 8/3 of the model dim, rounded up to a multiple of 64."""
    return 64 * math.ceil(settings.model_dim * 8 / 3 / 64)


def rms_norm(x, gain):
    """x over its root mean square, computed in float32. Zhang and Sennrich 2019, equation 4."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return (x32 * gain.astype(jnp.float32)).astype(x.dtype)


def rotate(x, positions):
    """Rotary positions: x [B, T, heads, H] turned by positions [T]. Su et al. 2021, section 3.4."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]  # [T, 1, H / 2]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def transformer_layer(x, layer, cache, position, attention):
    """One pre-norm layer on x [B, T, M].

    `cache` is None while training, else (keys, values) [B, S, K, H] that already hold the
    `position` tokens before x. Returns x and the cache with x's keys and values written into it.
    """
    layer = jax.tree.map(lambda p: p.astype(x.dtype), layer)
    positions = position + jnp.arange(x.shape[1])
    h = rms_norm(x, layer["attention_norm"])
    query = rotate(jnp.einsum("btm,mnh->btnh", h, layer["query"]), positions)
    key = rotate(jnp.einsum("btm,mkh->btkh", h, layer["key"]), positions)
    value = jnp.einsum("btm,mkh->btkh", h, layer["value"])
    if cache is None:
        context = attention(query, key, value)
    else:
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
            for old, new in zip(cache, (key, value), strict=True)
        )
        context = attention(query, *cache, query_offset=position)
    x = x + jnp.einsum("btnh,nhm->btm", context, layer["out"])
    h = rms_norm(x, layer["mlp_norm"])
    x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    return x, cache


def transformer(parameters, tokens, settings, attention, cache=None, position=0):
    """Logits float32 [B, T, V] of tokens [B, T], and the cache as `transformer_layer` has it.

    Every entry of `cache` has a leading axis for the layers.
    """
    # A product with one-hot rows: the gradient of indexing is a scatter, slow on CPUs and, on GPUs,
    # summed in another order every time.
    embedding = parameters["embedding"].astype(settings.dtype)
    x = jax.nn.one_hot(tokens, VOCABULARY, dtype=settings.dtype) @ embedding

    def step(x, layer_and_cache):
        layer, layer_cache = layer_and_cache
        return transformer_layer(x, layer, layer_cache, position, attention)

    if settings.remat:
        step = jax.checkpoint(step, policy=jax_fa3.remat_policy())
    x, cache = jax.lax.scan(step, x, (parameters["layers"], cache))
    h = rms_norm(x, parameters["final_norm"])
    logits = h @ parameters["logits"].astype(x.dtype)
    return logits.astype(jnp.float32), cache


def mean_loss(parameters, windows, settings, attention):
    """Mean cross entropy, nats a byte, of windows uint8 [B, T + 1]."""
    windows = windows.astype(jnp.int32)
    logits, _ = transformer(parameters, windows[:, :-1], settings, attention)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def make_optimizer():
    """AdamW without its learning rate, which `make_train_step` multiplies in."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        # Matrices only: a norm's gain has one axis beside the layers'.
        optax.add_decayed_weights(
            0.1,
            mask=lambda parameters: jax.tree.map_with_path(
                lambda path, _: "norm" not in jax.tree_util.keystr(path), parameters
            ),
        ),
    )


def global_norm(tree):
    """The 2-norm of all arrays of a tree taken as one vector."""
    return jnp.sqrt(sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(tree)))


def make_train_step(settings, attention):
    """jit of (state, windows, learning_rate) -> (state, loss, gradient norm before clipping)."""
    optimizer = make_optimizer()

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, windows, learning_rate):
        parameters, optimizer_state = state
        loss, gradients = jax.value_and_grad(mean_loss)(parameters, windows, settings, attention)
        updates, optimizer_state = optimizer.update(gradients, optimizer_state, parameters)
        parameters = jax.tree.map(lambda p, u: p - learning_rate * u, parameters, updates)
        return (parameters, optimizer_state), loss, global_norm(gradients)

    return train_step


def initial_state(settings, seed):
    """Parameters and optimiser state, a function of the seed."""
    parameters = initial_parameters(settings, seed)
    return parameters, make_optimizer().init(parameters)


def learning_rate_at(step, progress, settings):
    """Linear warm-up over the first 4 % of a run, then a cosine to a tenth of the peak.

    It follows progress in [0, 1], not the step, so a run that its time limit ends also anneals. The
    warm-up alone takes 16 steps or more: at the peak an untrained model jumps, and two attentions
    that differ by rounding jump apart.
    """
    warm_up = min(1.0, progress / 0.04, (step + 1) / 16)
    return settings.learning_rate * warm_up * (0.55 + 0.45 * math.cos(math.pi * progress))


@dataclasses.dataclass
class History:
    """What one training run leaves behind; losses in nats a byte."""

    losses: list[float]
    gradient_norms: list[float]
    learning_rates: list[float]
    validation: list[tuple[int, float]]  # (steps done, loss)
    compile_seconds: float  # the first step, which compiles
    train_seconds: float  # the other steps, evaluation left out
    tokens_per_second: float


def validation_windows(text, settings):
    """A fixed list of validation batches: about 8k tokens, in 2 to 16 batches."""
    batches = min(16, max(2, 8192 // (settings.batch_size * settings.seq_len)))
    return [random_windows(text, settings, (1, index)) for index in range(batches)]


def train(settings, attention, train_text, validation_text, seed):
    """Trains from scratch with a progress bar; returns (parameters, History)."""
    train_step = make_train_step(settings, attention)
    evaluate = jax.jit(lambda p, windows: mean_loss(p, windows, settings, attention))
    held_out = validation_windows(validation_text, settings)
    evaluate_at = {round(settings.steps * tenth / 10) for tenth in (1, 2, 4, 6, 8)}
    state = initial_state(settings, seed)
    tokens = settings.batch_size * settings.seq_len
    losses, norms, rates, validation = [], [], [], []
    begin = time.monotonic()
    compile_seconds = evaluate_seconds = 0.0

    def evaluated(step):
        nonlocal evaluate_seconds
        start = time.monotonic()
        loss = float(np.mean([float(evaluate(state[0], windows)) for windows in held_out]))
        evaluate_seconds += time.monotonic() - start
        validation.append((step, loss))
        return loss

    with tqdm.tqdm(total=settings.steps, unit="step", dynamic_ncols=True) as bar:
        for step in range(settings.steps):
            elapsed = time.monotonic() - begin if step else 0.0
            progress = step / settings.steps
            if settings.max_train_seconds:
                # Compiling counts towards the limit, but not towards the schedule.
                limit = max(1e-3, settings.max_train_seconds - compile_seconds)
                progress = max(progress, elapsed / limit)
            if progress >= 1:
                bar.write(
                    f"Time limit of {settings.max_train_seconds:.0f} s: "
                    f"{step} of {settings.steps} steps done."
                )
                break
            rate = learning_rate_at(step, progress + 1 / settings.steps, settings)
            windows = random_windows(train_text, settings, (seed, 0, step))
            state, loss, norm = train_step(state, windows, rate)
            losses.append(loss)
            norms.append(norm)
            rates.append(rate)
            # Reading the loss of the step before keeps one step in flight on an accelerator.
            shown = float(losses[-2] if len(losses) > 1 else losses[-1])
            if step == 0:  # It compiled; the clock and the schedule run from here.
                compile_seconds = time.monotonic() - begin
                begin += compile_seconds
            busy = time.monotonic() - begin - evaluate_seconds
            fields = {"loss": f"{shown:.3f}", "tokens/s": f"{step * tokens / max(busy, 1e-9):,.0f}"}
            if step + 1 in evaluate_at:
                evaluated(step + 1)
            if validation:
                fields["validation"] = f"{validation[-1][1]:.3f}"
            bar.set_postfix(fields, refresh=False)
            bar.update()
        jax.block_until_ready(state)
        train_seconds = time.monotonic() - begin - evaluate_seconds
        evaluated(len(losses))
    return state[0], History(
        losses=[float(x) for x in losses],
        gradient_norms=[float(x) for x in norms],
        learning_rates=rates,
        validation=validation,
        compile_seconds=compile_seconds,
        train_seconds=train_seconds,
        tokens_per_second=(len(losses) - 1) * tokens / train_seconds,
    )


# --------------------------------------------------------------------------------------------------
# After training
# --------------------------------------------------------------------------------------------------


def write_sample(parameters, settings, attention, prompt, seed):
    """Text the model writes after `prompt`, one byte a step through a key/value cache.

    The model knows positions up to its context only. When that is full, writing goes on from a
    new cache that holds the last half of it.
    """
    wanted = len(prompt.encode()) + settings.sample_bytes
    context = min(settings.seq_len, wanted)
    settings = dataclasses.replace(settings, remat=False)
    cache_shape = (settings.layers, 1, context, settings.key_value_heads, settings.head_dim)
    temperature = _TEMPERATURE.value

    def choose(logits, key):
        if temperature <= 0:
            return jnp.argmax(logits)
        return jax.random.categorical(key, logits / temperature)

    @jax.jit
    def fill_context(parameters, given, given_len, key):
        """given int32 [context], of which given_len count -> int32 [context] with the rest."""

        def step(carry, inputs):
            cache, chosen = carry
            position, given_byte, key = inputs
            token = jnp.where(position < given_len, given_byte, chosen).astype(jnp.int32)
            logits, cache = transformer(
                parameters, token[None, None], settings, attention, cache, position
            )
            return (cache, choose(logits[0, 0], key).astype(jnp.int32)), token

        cache = (jnp.zeros(cache_shape, settings.dtype),) * 2
        steps = (jnp.arange(context), given, jax.random.split(key, context))
        return jax.lax.scan(step, (cache, jnp.int32(0)), steps)[1]

    text = np.frombuffer(prompt.encode() or b"\n", dtype=np.uint8).astype(np.int32)
    key = jax.random.key(seed)
    while text.size < wanted:
        key, key_now = jax.random.split(key)
        given = text if text.size < context else text[-(context // 2) :]
        padded = np.pad(given, (0, context - given.size))
        filled = np.asarray(fill_context(parameters, padded, given.size, key_now))
        text = np.concatenate([text[: text.size - given.size], filled])
    decoded = text[:wanted].astype(np.uint8).tobytes().decode("utf-8", errors="replace")
    # A byte model may write control characters, which a terminal would obey.
    return "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in decoded
    )


@dataclasses.dataclass
class Comparison:
    """The first steps of one training, once with each attention."""

    names: tuple[str, str]
    losses: tuple[list[float], list[float]]
    gradient_norms: tuple[list[float], list[float]]
    loss_tolerance: float  # relative
    norm_tolerance: float  # relative

    @property
    def agrees(self):
        """True when every loss and gradient norm is within its tolerance (NaN never is)."""
        return all(
            np.allclose(ours, theirs, rtol=tolerance, atol=0, equal_nan=False)
            for (ours, theirs), tolerance in (
                (self.losses, self.loss_tolerance),
                (self.gradient_norms, self.norm_tolerance),
            )
        )

    def table(self):
        """Both runs side by side, one line a step."""
        ours, theirs = self.names
        width = max(12, len(ours), len(theirs))
        head = f"{ours:>{width}}  {theirs:>{width}}"
        lines = [
            f"{'':>4}  {'loss':^{2 * width + 2}}    {'gradient norm':^{2 * width + 2}}",
            f"step  {head}    {head}",
        ]
        for step, (loss, norm) in enumerate(
            zip(
                zip(*self.losses, strict=True), zip(*self.gradient_norms, strict=True), strict=True
            ),
            start=1,
        ):
            lines.append(
                f"{step:>4}  {loss[0]:>{width}.6f}  {loss[1]:>{width}.6f}"
                f"    {norm[0]:>{width}.6f}  {norm[1]:>{width}.6f}"
            )
        apart = [
            max(abs(a - b) / abs(b) for a, b in zip(*pair, strict=True))
            for pair in (self.losses, self.gradient_norms)
        ]
        lines.append(
            f"largest relative difference: loss {apart[0]:.1e} "
            f"(allowed {self.loss_tolerance:.0e}), gradient norm {apart[1]:.1e} "
            f"(allowed {self.norm_tolerance:.0e})"
        )
        return "\n".join(lines)


def compare_first_steps(settings, name, history, train_text, seed, steps):
    """Repeats the first steps of `history`, a run with attention `name`, with the other library's.

    Same parameters, batches and learning rates, so rounding is all that may differ. The gradient
    norm is compared too, because losses of an untrained model hardly depend on its attention.
    """
    other = "auto" if name in ("jax_nn", "cudnn") else "jax_nn"
    train_step = make_train_step(settings, make_attention(other))
    state = initial_state(settings, seed)
    losses, norms = [], []
    for step in range(min(steps, len(history.losses))):
        windows = random_windows(train_text, settings, (seed, 0, step))
        state, loss, norm = train_step(state, windows, history.learning_rates[step])
        losses.append(float(loss))
        norms.append(float(norm))
    # float32 leaves only the order of sums, which a few steps amplify. A 16-bit model rounds every
    # activation to 3 (bfloat16) or 4 digits.
    loss_tolerance, norm_tolerance = (1e-4, 1e-3) if settings.dtype == "float32" else (1e-2, 5e-2)
    label = {"jax_nn": "jax.nn", "cudnn": "jax.nn cudnn", "auto": "jax_fa3"}
    return Comparison(
        names=(label.get(name, f"jax_fa3 {name}"), label[other]),
        losses=(history.losses[: len(losses)], losses),
        gradient_norms=(history.gradient_norms[: len(norms)], norms),
        loss_tolerance=loss_tolerance,
        norm_tolerance=norm_tolerance,
    )


def explain_attention(settings, name):
    """Which implementation the training step's attention calls ran, and why, as text."""
    if name in ("jax_nn", "cudnn"):
        return f"{ATTENTION_CHOICES[name]}, because --attention={name} asks for it"
    shape = (settings.batch_size, settings.seq_len)
    query = jax.ShapeDtypeStruct(
        (*shape, settings.query_heads, settings.head_dim), jnp.dtype(settings.dtype)
    )
    key = jax.ShapeDtypeStruct(
        (*shape, settings.key_value_heads, settings.head_dim), jnp.dtype(settings.dtype)
    )
    implementation = None if name == "auto" else name
    return str(
        jax_fa3.explain(query, key, key, is_causal=True, implementation=implementation)
    ).rstrip()


def draw_loss_curve(history, settings, entropy, path):
    """The loss curve as a PNG at `path`: training, validation and the unigram entropy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    losses = np.array(history.losses)
    steps = np.arange(1, losses.size + 1)
    window = max(1, losses.size // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(steps[window - 1 :], smooth, color="#08519c", label=f"training, mean of {window}")
    axes.plot(*zip(*history.validation, strict=True), "o", color="#d94801", label="validation")
    axes.axhline(entropy, color="#737373", linestyle="--", label="unigram entropy")
    axes.set(
        xlabel=f"step of {settings.batch_size * settings.seq_len:,} bytes",
        ylabel="cross entropy, nats a byte",
        ylim=(0, max(entropy * 1.2, float(smooth.max()))),
        title=f"Python's standard library, {settings.layers} layers, model dim "
        f"{settings.model_dim}, context {settings.seq_len}, {settings.dtype}",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_results(path, settings, history, comparison, **more):
    """The run as JSON: settings, versions, losses and what the caller adds."""
    device = jax.devices()[0]
    results = {
        "kind": "train_lm",
        "settings": dataclasses.asdict(settings),
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "steps": len(history.losses),
        "first_loss": history.losses[0],
        "final_validation_loss": history.validation[-1][1],
        "compile_seconds": history.compile_seconds,
        "train_seconds": history.train_seconds,
        "tokens_per_second": history.tokens_per_second,
        "losses": [round(loss, 5) for loss in history.losses],
        "validation": history.validation,
        "comparison": comparison and dataclasses.asdict(comparison) | {"agrees": comparison.agrees},
        **more,
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def _heading(title):
    print(f"\n--- {title} " + "-" * max(0, 95 - len(title)), flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    begin = time.monotonic()
    settings = settings_from_flags()
    name, seed = _ATTENTION.value, _SEED.value
    attention = make_attention(name)
    output_dir = pathlib.Path(_OUTPUT_DIR.value)
    output_dir.mkdir(parents=True, exist_ok=True)

    train_text, validation_text = read_standard_library()
    entropy = unigram_entropy(train_text)
    size = sum(
        math.prod(p.shape)
        for p in jax.tree.leaves(jax.eval_shape(lambda: initial_parameters(settings, seed)))
    )
    print(
        f"Text       Python {platform.python_version()}'s standard library: "
        f"{train_text.size / 1e6:.1f} MB to train, {validation_text.size / 1e6:.2f} MB held out, "
        f"unigram entropy {entropy:.3f} nats a byte\n"
        f"Model      {size / 1e6:.2f} M parameters: {settings.layers} layers, model dim "
        f"{settings.model_dim}, {settings.query_heads} query and {settings.key_value_heads} "
        f"key/value heads of {settings.head_dim}, {settings.dtype}\n"
        f"Steps      {settings.steps} of {settings.batch_size} x {settings.seq_len} bytes on "
        f"{jax.devices()[0].device_kind} ({jax.default_backend()}), --attention={name}",
        flush=True,
    )
    parameters, history = train(settings, attention, train_text, validation_text, seed)
    final = history.validation[-1][1]

    _heading("A sample of what it writes")
    # cuDNN takes no mask over one query and a cache, so that run decodes with jax.nn's XLA path.
    decoder = make_attention("jax_nn" if name == "cudnn" else name)
    sample = write_sample(parameters, settings, decoder, _PROMPT.value, seed)
    print(sample)
    del parameters

    comparison = None
    if _COMPARE_STEPS.value:
        _heading("The same first steps with the other attention")
        comparison = compare_first_steps(
            settings, name, history, train_text, seed, _COMPARE_STEPS.value
        )
        print(comparison.table())

    _heading("Which attention ran, and why")
    explanation = explain_attention(settings, name)
    print(explanation)

    curve = output_dir / "train_lm.png"
    draw_loss_curve(history, settings, entropy, curve)
    total_seconds = time.monotonic() - begin
    results = output_dir / "train_lm.json"
    write_results(
        results,
        settings,
        history,
        comparison,
        attention=name,
        explanation=explanation,
        parameters=size,
        unigram_entropy=entropy,
        total_seconds=total_seconds,
        sample=sample,
    )

    _heading("Result")
    print(
        f"Loss       {history.losses[0]:.3f} at the first step, {final:.3f} nats a byte on "
        f"held-out files at the end ({final / math.log(2):.2f} bits); "
        f"unigram entropy {entropy:.3f}\n"
        f"Speed      {history.tokens_per_second:,.0f} tokens/s over {history.train_seconds:.1f} s; "
        f"compiling the first step took {history.compile_seconds:.1f} s\n"
        f"Written    {curve} (loss curve), {results}\n"
        f"Time       {total_seconds:.1f} s in all",
        flush=True,
    )
    if not all(math.isfinite(loss) for loss in (*history.losses, final)):
        print("FAILED: a loss is not finite.", file=sys.stderr)
        return 1
    if comparison is not None and not comparison.agrees:
        print(
            f"FAILED: {comparison.names[0]} and {comparison.names[1]} disagree over the first "
            "steps; the table above shows where.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    app.run(main)
