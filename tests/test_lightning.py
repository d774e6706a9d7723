"""ALS in LightningModules: the numbers of a plain loop, and clear errors where the two do not go together."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers.loops import STEPS, assert_same_run, batches, build, closures, loop, network, optimizer, plain_step
from helpers.tiny import assert_same
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

import fastals

lightning = pytest.importorskip("lightning")
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Manual(lightning.LightningModule):
    """The ``training_step`` of the README, with a schedule of ``lr``."""

    def __init__(self, dropout=0.1, **options):
        super().__init__()
        self.net, self.options, self.losses = network(dropout=dropout), options, []
        self.automatic_optimization = False

    def configure_optimizers(self):
        opt, scheduler = optimizer(self.net, **self.options)
        return [opt], [scheduler]

    def on_train_epoch_start(self):
        torch.manual_seed(1 + self.current_epoch)  # Lightning restores no generators

    def closure_of(self, batch):
        return lambda: self.net(**batch)

    def training_step(self, batch, _):
        loss = self.optimizers().step(self.closure_of(batch), backward=self.manual_backward)
        self.log("loss", loss)
        self.losses.append(float(loss))
        self.lr_schedulers().step()

    @property
    def run(self):
        """The network and its optimizer."""
        return self.net, self.optimizers().optimizer


def fitted(module, resumed=None, data=None, **options):
    """The module after an epoch; the loader draws from a generator of its own."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "max_epochs": 1} | options
    trainer = lightning.Trainer(accelerator="cpu", **quiet | options)
    loader = DataLoader(data or batches(), batch_size=None, generator=torch.Generator())
    trainer.fit(module, loader, ckpt_path=resumed)
    return module


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [
        ("32-true", torch.float32, nullcontext()),
        ("64-true", torch.float64, nullcontext()),
        ("bf16-true", torch.bfloat16, nullcontext()),
        ("bf16-mixed", torch.float32, torch.autocast("cpu", torch.bfloat16, cache_enabled=False)),
    ],
)
def test_a_run_is_the_plain_run(precision, dtype, autocast):
    module = fitted(Manual(), precision=precision)
    with autocast:
        plain = loop(*build(dtype))
    assert_same_run(module.run, plain)
    assert module.trainer.global_step == STEPS
    assert module.losses == [r.loss_before for r in plain[1].reports]


def test_clipping_is_an_argument_of_the_optimizer():
    clipped = {"max_grad_norm": 0.1}
    assert_same_run(fitted(Manual(**clipped)).run, loop(*build(**clipped)))
    with pytest.raises(MisconfigurationException, match="gradient clipping is not supported for manual"):
        fitted(Manual(), gradient_clip_val=0.1)


class Given(Manual):
    """Gradients that were computed before the step, and clipped by Lightning."""

    def training_step(self, batch, _):
        opt, loss = self.optimizers(), self.net(**batch)
        self.manual_backward(loss)
        self.clip_gradients(opt, 0.1, "norm")
        opt.step(self.closure_of(batch), loss=loss)
        opt.zero_grad()


def test_slopes_are_those_of_gradients_that_lightning_has_clipped():
    _, opt = fitted(Given(schedule="sweep", direction="sgd")).run
    for report in opt.reports:
        assert sum(u.slope for u in report.units) == pytest.approx(0.1**2, rel=1e-5)
        assert report.loss_after < report.loss_before


class Hooked(Manual):
    """Micro-batches, and the gradients that the hook before an optimizer step sees."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def closure_of(self, batch):
        return fastals.MicroBatches(closures(self.net, batch, divisor=4))

    def on_before_optimizer_step(self, _):
        self.seen.append([p.grad.clone() for p in self.net.parameters()])


def test_micro_batches_are_the_whole_mini_batch_and_the_hook_before_the_step_sees_all_their_gradients():
    def step(model, opt, batch):
        plain_step(model, opt, batch)
        gradients.append([p.grad.clone() for p in model.parameters()])

    gradients = []
    plain, _ = loop(*build(torch.float64, dropout=0.0), step=step)
    module = fitted(Hooked(dropout=0.0), precision="64-true")
    torch.testing.assert_close([*module.net.parameters()], [*plain.parameters()], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.seen, gradients, rtol=1e-9, atol=1e-9)
    with pytest.raises(MisconfigurationException, match="gradient accumulation is not supported for manual"):
        fitted(Manual(), accumulate_grad_batches=4)


class Logging(Manual):
    """Logs inside of the closure, which runs in every trial."""

    def closure_of(self, batch):
        def closure():
            loss = self.net(**batch)
            self.log("inside", loss, on_step=False, on_epoch=True)
            self.log_dict({"dict": 2 * loss}, on_step=False, on_epoch=True)
            return loss

        return closure


def test_a_mini_batch_is_logged_once():
    module = fitted(Logging())
    metrics, mean = module.trainer.callback_metrics, sum(module.losses) / STEPS
    assert float(metrics["inside"]) == pytest.approx(mean, rel=1e-6)
    assert float(metrics["dict"]) == pytest.approx(2 * mean, rel=1e-6)
    assert float(metrics["loss"]) == module.losses[-1]
    assert_same_run(module.run, loop(*build()))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_checkpoint_goes_on_to_the_last_bit(tmp_path, precision):
    def run(resumed=None):
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        options = {"precision": precision, "max_epochs": 2, "enable_checkpointing": True, "callbacks": [saving]}
        module = fitted(Manual(), resumed, **options)
        module.trainer.save_checkpoint(tmp_path / "end.ckpt")
        return module, torch.load(tmp_path / "end.ckpt", weights_only=True)

    (whole, ended), (again, ended_again) = run(), run(tmp_path / "epoch=0.ckpt")
    assert_same_run(again.run, whole.run)
    assert again.losses == whole.losses[STEPS:]
    assert again.trainer.global_step == 2 * STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(ended_again[part], ended[part])


class Automatic(Manual):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, _):
        return self.net(**batch)


class Overriding(Automatic):
    how = staticmethod(lambda optimizer, closure: optimizer.step(closure=closure))

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        self.how(optimizer, optimizer_closure)


OVERRIDES = {
    "itself": lambda optimizer, closure: optimizer.step(closure=closure),
    "inner": lambda optimizer, closure: optimizer.optimizer.step(closure),
    "within": lambda optimizer, closure: optimizer.step(lambda: closure()),
}


@pytest.mark.parametrize("how", [None, *OVERRIDES])
def test_automatic_optimization_is_refused(how):
    module = Overriding() if how else Automatic()
    module.how = OVERRIDES.get(how)
    with pytest.raises(RuntimeError, match=r"automatic optimization makes.*automatic_optimization = False"):
        fitted(module)
    assert_same(module.net.state_dict(), network().state_dict())


def test_a_gradient_scaler_is_refused():
    """On a GPU this is 16-mixed: Lightning unscales before the step, and keeps the closure from the optimizer."""
    module, scaler = Manual(), torch.amp.GradScaler("cpu")
    with pytest.raises(AssertionError, match=r"did not use scaler\.scale"):
        fitted(module, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert_same(module.net.state_dict(), network().state_dict())


class WithoutClosure(Manual):
    def training_step(self, batch, _):
        self.manual_backward(self.net(**batch))
        self.optimizers().step()


def test_a_step_without_a_closure_is_refused():
    with pytest.raises(TypeError, match="needs a closure"):
        fitted(WithoutClosure())


def adversaries():
    """A generator and a discriminator, and the optimizer of each."""
    torch.manual_seed(0)
    generator, discriminator = (
        nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, outputs)) for outputs in (4, 1)
    )
    optimizers = fastals.ALS(generator, modules=[discriminator]), fastals.ALS(discriminator, modules=[generator])
    return generator, discriminator, optimizers


def score(discriminator, x, real):
    return F.binary_cross_entropy_with_logits(discriminator(x), torch.full((len(x), 1), float(real)))


def deceives(generator, discriminator, noise):
    return score(discriminator, generator(noise), real=True)


def discerns(generator, discriminator, noise, x):
    return score(discriminator, generator(noise).detach(), real=False) + score(discriminator, x, real=True)


def noises():
    """Noise and real data for each mini-batch."""
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(8, 4, generator=generator), torch.rand(8, 4, generator=generator)) for _ in range(STEPS)]


class Adversaries(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator, self.made = adversaries()

    def configure_optimizers(self):
        return self.made

    def on_train_start(self):
        torch.manual_seed(1)

    def training_step(self, batch, _):
        noise, x = batch
        both = self.generator, self.discriminator
        for opt, closure in zip(
            self.optimizers(), (lambda: deceives(*both, noise), lambda: discerns(*both, noise, x)), strict=True
        ):
            self.toggle_optimizer(opt)
            opt.step(closure, backward=self.manual_backward)
            self.untoggle_optimizer(opt)


def test_two_optimizers_take_the_steps_of_a_plain_loop():
    module = fitted(Adversaries(), data=noises())
    generator, discriminator, (first, second) = adversaries()
    torch.manual_seed(1)
    for noise, x in noises():
        first.step(lambda: deceives(generator, discriminator, noise))  # noqa: B023
        second.step(lambda: discerns(generator, discriminator, noise, x))  # noqa: B023
    assert_same_run((module.generator, module.made[0]), (generator, first))
    assert_same_run((module.discriminator, module.made[1]), (discriminator, second))
    assert module.trainer.global_step == 2 * STEPS
    for opt in module.made:
        assert all(r.loss_after < r.loss_before for r in opt.reports)


class Mean(nn.Module):
    def forward(self, x):
        return x.square().mean()


def test_modules_of_fabric_are_ordinary_closures():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), Mean())
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    opt = fastals.ALS(model)
    opt.step(partial(fabric.setup_module(model), torch.ones(3, 4)), backward=fabric.backward)
    assert opt.report.loss_after < opt.report.loss_before
