//! The tensors of a Llama-family model: what each is for, what shape it has, and what files call it.

use std::collections::BTreeMap;

use crate::{ModelConfig, TensorFormat};

/// The format of each tensor that a checkpoint holds.
pub type TensorFormats = BTreeMap<TensorRole, TensorFormat>;

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorRole {
    TokenEmbedding,
    OutputNorm,
    LmHead,
    Layer { layer: usize, tensor: LayerTensor },
}

/// A tensor of one decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerTensor {
    InputNorm,
    Q,
    K,
    V,
    O,
    PostAttentionNorm,
    Gate,
    Up,
    Down,
    QBias,
    KBias,
    VBias,
    OBias,
    GateBias,
    UpBias,
    DownBias,
}

impl LayerTensor {
    pub const ALL: [Self; 16] = [
        Self::InputNorm,
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::PostAttentionNorm,
        Self::Gate,
        Self::Up,
        Self::Down,
        Self::QBias,
        Self::KBias,
        Self::VBias,
        Self::OBias,
        Self::GateBias,
        Self::UpBias,
        Self::DownBias,
    ];

    fn is_vector(self) -> bool {
        match self {
            Self::Q | Self::K | Self::V | Self::O | Self::Gate | Self::Up | Self::Down => false,
            Self::InputNorm | Self::PostAttentionNorm => true,
            Self::QBias | Self::KBias | Self::VBias | Self::OBias => true,
            Self::GateBias | Self::UpBias | Self::DownBias => true,
        }
    }

    fn gguf_name(self) -> &'static str {
        match self {
            Self::InputNorm => "attn_norm.weight",
            Self::Q => "attn_q.weight",
            Self::K => "attn_k.weight",
            Self::V => "attn_v.weight",
            Self::O => "attn_output.weight",
            Self::PostAttentionNorm => "ffn_norm.weight",
            Self::Gate => "ffn_gate.weight",
            Self::Up => "ffn_up.weight",
            Self::Down => "ffn_down.weight",
            Self::QBias => "attn_q.bias",
            Self::KBias => "attn_k.bias",
            Self::VBias => "attn_v.bias",
            Self::OBias => "attn_output.bias",
            Self::GateBias => "ffn_gate.bias",
            Self::UpBias => "ffn_up.bias",
            Self::DownBias => "ffn_down.bias",
        }
    }

    fn hugging_face_name(self) -> &'static str {
        match self {
            Self::InputNorm => "input_layernorm.weight",
            Self::Q => "self_attn.q_proj.weight",
            Self::K => "self_attn.k_proj.weight",
            Self::V => "self_attn.v_proj.weight",
            Self::O => "self_attn.o_proj.weight",
            Self::PostAttentionNorm => "post_attention_layernorm.weight",
            Self::Gate => "mlp.gate_proj.weight",
            Self::Up => "mlp.up_proj.weight",
            Self::Down => "mlp.down_proj.weight",
            Self::QBias => "self_attn.q_proj.bias",
            Self::KBias => "self_attn.k_proj.bias",
            Self::VBias => "self_attn.v_proj.bias",
            Self::OBias => "self_attn.o_proj.bias",
            Self::GateBias => "mlp.gate_proj.bias",
            Self::UpBias => "mlp.up_proj.bias",
            Self::DownBias => "mlp.down_proj.bias",
        }
    }
}

impl TensorRole {
    /// Norm weights and biases: one column, kept as f32 by every backend.
    pub fn is_vector(self) -> bool {
        match self {
            Self::TokenEmbedding | Self::LmHead => false,
            Self::OutputNorm => true,
            Self::Layer { tensor, .. } => tensor.is_vector(),
        }
    }

    /// Its name in GGUF files of the llama architecture.
    pub fn gguf_name(self) -> String {
        match self {
            Self::TokenEmbedding => "token_embd.weight".to_owned(),
            Self::OutputNorm => "output_norm.weight".to_owned(),
            Self::LmHead => "output.weight".to_owned(),
            Self::Layer { layer, tensor } => format!("blk.{layer}.{}", tensor.gguf_name()),
        }
    }

    /// Its name in Hugging Face checkpoints of `LlamaForCausalLM` and its kin.
    pub fn hugging_face_name(self) -> String {
        match self {
            Self::TokenEmbedding => "model.embed_tokens.weight".to_owned(),
            Self::OutputNorm => "model.norm.weight".to_owned(),
            Self::LmHead => "lm_head.weight".to_owned(),
            Self::Layer { layer, tensor } => format!("model.layers.{layer}.{}", tensor.hugging_face_name()),
        }
    }
}

impl ModelConfig {
    /// Every tensor a model of this configuration is made of, in the order of the forward pass. Without `LmHead` when
    /// the embeddings are tied.
    pub fn roles(&self) -> impl Iterator<Item = TensorRole> + '_ {
        let layers = (0..self.num_hidden_layers)
            .flat_map(|layer| LayerTensor::ALL.map(|tensor| TensorRole::Layer { layer, tensor }));
        let head = (!self.tie_word_embeddings).then_some(TensorRole::LmHead);
        std::iter::once(TensorRole::TokenEmbedding)
            .chain(layers)
            .chain([TensorRole::OutputNorm])
            .chain(head)
            .filter(|&role| self.shape(role).is_some())
    }

    /// `(rows = output features, cols = input features)` of a tensor; vectors have one column. None if the model has no
    /// such tensor. Tied embeddings: `LmHead` is `TokenEmbedding` under another name.
    pub fn shape(&self, role: TensorRole) -> Option<(usize, usize)> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.q_dim(), self.kv_dim());
        let (layer, tensor) = match role {
            TensorRole::TokenEmbedding | TensorRole::LmHead => return Some((self.vocab_size, hidden)),
            TensorRole::OutputNorm => return Some((hidden, 1)),
            TensorRole::Layer { layer, tensor } => (layer, tensor),
        };
        let attention = |rows: usize| self.attention_bias.then_some((rows, 1));
        let mlp = |rows: usize| self.mlp_bias.then_some((rows, 1));
        let shape = match tensor {
            LayerTensor::InputNorm | LayerTensor::PostAttentionNorm => Some((hidden, 1)),
            LayerTensor::Q => Some((q, hidden)),
            LayerTensor::K | LayerTensor::V => Some((kv, hidden)),
            LayerTensor::O => Some((hidden, q)),
            LayerTensor::Gate | LayerTensor::Up => Some((intermediate, hidden)),
            LayerTensor::Down => Some((hidden, intermediate)),
            LayerTensor::QBias => attention(q),
            LayerTensor::KBias | LayerTensor::VBias => attention(kv),
            LayerTensor::OBias => attention(hidden),
            LayerTensor::GateBias | LayerTensor::UpBias => mlp(intermediate),
            LayerTensor::DownBias => mlp(hidden),
        };
        shape.filter(|_| layer < self.num_hidden_layers)
    }
}
