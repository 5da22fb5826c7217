"""The decoder that is trained before the embedder, for Table 5."""

from rich.progress import track
from torch.optim import Adam

from .loss import decoder_loss
from .pairs import Pairing
from .torch_model import Decoder, Embedder

DECODER_EPOCHS = 20  # the paper gives no number


def pretrain(decoder: Decoder, embedder: Embedder, pairing: Pairing, learning_rate: float) -> None:
    """Train a decoder, with an embedder that is thrown away, on its loss alone (Section 5.2), and freeze it."""
    decoder.requires_grad_().train()
    optimizer = Adam([*embedder.train().parameters(), *decoder.parameters()], lr=learning_rate)
    for _ in track(range(DECODER_EPOCHS), description="Training the decoder"):
        for features in pairing.clean_features(pairing.defect_free):
            loss = decoder_loss(features, decoder(embedder(features), [f.shape[-2:] for f in features]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    decoder.requires_grad_(requires_grad=False).eval()
