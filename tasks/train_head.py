"""Train the head on the precomputed activations: an epoch takes seconds."""

from pipeline.artifacts import artifact
from pipeline.inputs import precomputed
from pipeline.step import Run, step
from pipeline.training_log import callbacks, keep
from unfreeze.batches.loader import batches_per_epoch, images_per_batch
from unfreeze.data.packed import open_packed
from unfreeze.device import seed_everything
from unfreeze.models.classifier import Head
from unfreeze.models.weights import save_head
from unfreeze.settings.schema import Head as HeadSettings
from unfreeze.settings.schema import Train, TrainHead
from unfreeze.training.phases import Activations, fit_head


@step
def train_head(
    run: Run, seed: int, batch_size: int | str, head: HeadSettings, train: Train, train_head: TrainHead
) -> dict[str, float]:
    seed_everything(seed)
    device = run.device
    packed = open_packed(artifact("ingest", ""))
    size = images_per_batch(batch_size, packed)
    activations = precomputed("activations.npy")
    model = Head(activations.shape[1], len(packed.classes), head.dropout).to(device)
    rate = run.read_metrics("lr_find")["rate"]
    data = Activations(activations, packed.labels, packed.rows("train"), packed.rows("valid"), size, seed, device)
    batches = batches_per_epoch(len(data.train), size)
    history = fit_head(model, data, rate, train_head, train, callbacks(run, train_head.epochs, batches))
    save_head(model, run.path("head.safetensors"))
    return keep(run, history)
