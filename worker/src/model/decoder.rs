//! The decoder that LLaMA made common: RMS norm ahead of each half, rotary positions, grouped queries, gated feed-forward.
//!
//! LLaMA, Mistral, Qwen2 and Qwen3 differ only in what their family files put into [`Spec`].

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::Checkpoint;
use espalier_common::ids::LayerIndex;
use espalier_common::outline::LayerOutline;
use espalier_common::structure::{AttentionUnit, Divides, HeadCounts, LayerStructure, Pair, Structure, Uneven};

use super::attention::Attention;
use super::blocks::{Linear, Norm, join};
use super::config::Config;
use super::load::{Expected, LinearSpec, Loader};
use super::rope::Rope;
use super::structure::{Coupled, Heads, parameters};
use super::{Activation, Anatomy, Carry, Decoder, DecoderLayer, Head, HeadNorm, ModelError, Rotation, anatomy, fused};

const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

/// Where the families differ.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// Name of the family.
    pub(super) family: &'static str,
    /// q, k and v have biases.
    pub(super) qkv_bias: bool,
    /// o has a bias.
    pub(super) o_bias: bool,
    /// gate, up and down have biases.
    pub(super) mlp_bias: bool,
    /// q and k are normalised head by head.
    pub(super) qk_norm: bool,
    /// The attention window of each layer.
    pub(super) windows: Vec<Option<usize>>,
    /// KV heads and channels of each layer where the config tells them layer by layer.
    pub(super) widths: Option<Vec<Widths>>,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Widths {
    /// KV heads.
    pub(super) kv_heads: usize,
    /// Feed-forward channels.
    pub(super) channels: usize,
}

/// A decoder of the common kind.
pub(super) struct PreNormDecoder {
    spec: Spec,
    loader: Loader,
    hidden: usize,
    vocabulary: usize,
    heads: usize,
    /// One entry a layer.
    widths: Vec<Widths>,
    head_dim: usize,
    epsilon: f64,
    max_positions: Option<usize>,
    tied: bool,
    rope: Arc<Rope>,
}

impl PreNormDecoder {
    /// Reads the dimensions that all families name alike, and checks the tensors outside the layers.
    pub(super) fn open(
        checkpoint: Arc<dyn Checkpoint>,
        device: &Device,
        config: &Config<'_>,
        spec: Spec,
    ) -> Result<Self, ModelError> {
        let activation = config.text("hidden_act")?.unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(config.refuse("hidden_act", format!("{activation} is not silu")));
        }
        let hidden = config.dimension("hidden_size")?;
        let heads = config.dimension("num_attention_heads")?;
        let widths = match &spec.widths {
            Some(widths) => widths.clone(),
            None => {
                let kv_heads = config.dimension_if_any("num_key_value_heads")?.unwrap_or(heads);
                if !heads.is_multiple_of(kv_heads) {
                    let reason = format!("{kv_heads} does not divide num_attention_heads = {heads}");
                    return Err(config.refuse("num_key_value_heads", reason));
                }
                vec![Widths { kv_heads, channels: config.dimension("intermediate_size")? }; spec.windows.len()]
            }
        };
        let head_dim = match config.dimension_if_any("head_dim")? {
            Some(head_dim) => head_dim,
            None => config.head_width(hidden, heads)?,
        };
        let decoder = Self {
            spec,
            loader: Loader::new(checkpoint, device),
            hidden,
            vocabulary: config.dimension("vocab_size")?,
            heads,
            widths,
            head_dim,
            epsilon: config.positive_if_any("rms_norm_eps")?.unwrap_or(1e-6),
            max_positions: config.dimension_if_any("max_position_embeddings")?,
            tied: config.flag("tie_word_embeddings", false)?,
            rope: Arc::new(Rope::from_config(config, head_dim, device)?),
        };
        decoder.loader.expect(EMBEDDING, &[decoder.vocabulary, hidden])?;
        decoder.loader.expect(FINAL_NORM, &[hidden])?;
        decoder.loader.expect(decoder.head_name(), &[decoder.vocabulary, hidden])?;
        Ok(decoder)
    }

    fn head_name(&self) -> &'static str {
        if self.tied { EMBEDDING } else { HEAD }
    }

    /// The widths of a layer. One beyond the last has none of its own, nor any tensors, which then are what is missed.
    fn widths_of(&self, layer: LayerIndex) -> Widths {
        let last = self.widths.last().copied().expect("a config has at least one layer");
        self.widths.get(layer.0 as usize).copied().unwrap_or(last)
    }

    /// The linear maps of a layer: q, k, v → o → gate, up → down.
    fn groups(&self, layer: LayerIndex) -> Vec<Vec<LinearSpec>> {
        let linear = |name: &str, rows, columns, bias| LinearSpec {
            name: format!("model.layers.{layer}.{name}"),
            rows,
            columns,
            bias,
        };
        let Spec { qkv_bias, o_bias, mlp_bias, .. } = self.spec;
        let Widths { kv_heads, channels } = self.widths_of(layer);
        let (q_width, kv_width) = (self.heads * self.head_dim, kv_heads * self.head_dim);
        vec![
            vec![
                linear("self_attn.q_proj", q_width, self.hidden, qkv_bias),
                linear("self_attn.k_proj", kv_width, self.hidden, qkv_bias),
                linear("self_attn.v_proj", kv_width, self.hidden, qkv_bias),
            ],
            vec![linear("self_attn.o_proj", self.hidden, q_width, o_bias)],
            vec![
                linear("mlp.gate_proj", channels, self.hidden, mlp_bias),
                linear("mlp.up_proj", channels, self.hidden, mlp_bias),
            ],
            vec![linear("mlp.down_proj", self.hidden, channels, mlp_bias)],
        ]
    }

    /// The other tensors of a layer: the two norms, then those of q and k.
    fn norms(&self, layer: LayerIndex) -> Vec<Expected> {
        let norm = |name: &str, width| (format!("model.layers.{layer}.{name}.weight"), vec![width]);
        let mut norms = vec![norm("input_layernorm", self.hidden), norm("post_attention_layernorm", self.hidden)];
        if self.spec.qk_norm {
            norms.extend([norm("self_attn.q_norm", self.head_dim), norm("self_attn.k_norm", self.head_dim)]);
        }
        norms
    }

    fn load_norm(&self, name: &str, shape: &[usize]) -> Result<Norm, ModelError> {
        Ok(Norm::Rms { weight: self.loader.tensor(name, shape)?, epsilon: self.epsilon })
    }
}

impl Decoder for PreNormDecoder {
    fn family(&self) -> &'static str {
        self.spec.family
    }

    fn layers(&self) -> usize {
        self.spec.windows.len()
    }

    fn hidden_size(&self) -> usize {
        self.hidden
    }

    fn vocabulary_size(&self) -> usize {
        self.vocabulary
    }

    fn max_sequence_length(&self) -> Option<usize> {
        self.max_positions
    }

    fn outline(&self, layer: LayerIndex) -> Result<LayerOutline, ModelError> {
        self.loader.outline(&self.groups(layer), &self.norms(layer))
    }

    fn structure(&self, unit: AttentionUnit) -> Structure {
        let llama = self.spec.family == super::llama::FAMILY.name;
        let layers = (0..self.layers()).map(|layer| {
            let groups = self.groups(LayerIndex(layer as u32));
            let Widths { kv_heads, channels } = self.widths[layer];
            let heads = Heads { queries: self.heads / kv_heads, kv_heads, head_dim: self.head_dim };
            let attention = heads.pair(&groups, unit);
            // transformers refuses other LLaMA configs, even with a head_dim of their own.
            let divides = attention.config.get("num_attention_heads").filter(|_| llama).map(|&per_block| Divides {
                key: "num_attention_heads".to_owned(),
                per_block,
                of_key: "hidden_size".to_owned(),
                of: self.hidden,
            });
            let channels = Coupled {
                producers: groups[2].iter().map(|producer| (producer, 1)).collect(),
                consumer: &groups[3][0],
                blocks: channels,
                stride: 1,
                runs: 1,
                config: &[("intermediate_size", 1)],
            };
            LayerStructure {
                parameters: parameters(&groups),
                attention: Some(Pair {
                    divides: divides.filter(|rule| rule.of.is_multiple_of(self.heads)),
                    ..attention
                }),
                channels: channels.pair(),
            }
        });
        let biased = self.spec.qkv_bias || self.spec.o_bias || self.spec.mlp_bias;
        Structure {
            explicit: [("head_dim".to_owned(), self.head_dim)].into(),
            layers: layers.collect(),
            uneven: (llama && !biased)
                .then_some(Uneven { hidden: self.hidden, multiple: super::nemotron_nas::MULTIPLE }),
            // A config that tells layers apart is not written anew.
            only_masks: self.spec.widths.is_some(),
            heads: (self.widths.first().filter(|_| self.spec.widths.is_none()))
                .map(|widths| HeadCounts { query: self.heads, kv: widths.kv_heads }),
        }
    }

    fn device(&self) -> &Device {
        self.loader.device()
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        self.loader.embedding(EMBEDDING, [self.vocabulary, self.hidden], tokens)
    }

    fn load_layer(&self, layer: LayerIndex) -> Result<Box<dyn DecoderLayer>, ModelError> {
        let norms: Vec<Norm> =
            self.norms(layer).iter().map(|(name, shape)| self.load_norm(name, shape)).collect::<Result<_, _>>()?;
        let mut norms = norms.into_iter();
        let window = self.spec.windows.get(layer.0 as usize).copied().flatten();
        let Widths { kv_heads, .. } = self.widths_of(layer);
        Ok(Box::new(PreNormLayer {
            groups: self.loader.linears(&self.groups(layer))?,
            attention_norm: norms.next().expect("the first of two norms"),
            mlp_norm: norms.next().expect("the second of two norms"),
            qk_norm: norms.next().zip(norms.next()),
            attention: Attention { heads: self.heads, kv_heads, head_dim: self.head_dim, window },
            rope: self.rope.clone(),
        }))
    }

    fn load_head(&self) -> Result<Box<dyn Head>, ModelError> {
        Ok(Box::new(PreNormHead {
            norm: self.load_norm(FINAL_NORM, &[self.hidden])?,
            weight: self.loader.tensor(self.head_name(), &[self.vocabulary, self.hidden])?,
        }))
    }
}

#[derive(Clone)]
struct PreNormLayer {
    groups: Vec<Vec<Linear>>,
    attention_norm: Norm,
    mlp_norm: Norm,
    qk_norm: Option<(Norm, Norm)>,
    attention: Attention,
    rope: Arc<Rope>,
}

impl PreNormLayer {
    /// Normalises each head of `[tokens, heads · head_dim]` by itself.
    fn per_head(&self, x: &Tensor, norm: &Norm) -> Result<Tensor, ModelError> {
        let heads = x.reshape(((), self.attention.head_dim))?;
        Ok(norm.forward(&heads)?.reshape(x.shape())?)
    }
}

impl DecoderLayer for PreNormLayer {
    fn groups(&self) -> usize {
        self.groups.len()
    }

    fn begin(&self, hidden: &Tensor) -> Result<Carry, ModelError> {
        Ok(Carry { residual: hidden.clone(), input: self.attention_norm.forward(hidden)? })
    }

    fn advance(&self, group: usize, carry: Carry) -> Result<Carry, ModelError> {
        let Carry { residual, input } = carry;
        match (group, self.groups[group].as_slice()) {
            (0, [q, k, v]) => {
                let (mut q, mut k, v) = (q.forward(&input)?, k.forward(&input)?, v.forward(&input)?);
                if let Some((q_norm, k_norm)) = &self.qk_norm {
                    (q, k) = (self.per_head(&q, q_norm)?, self.per_head(&k, k_norm)?);
                }
                let table = self.rope.table(input.dim(0)?)?;
                Ok(Carry { residual, input: self.attention.forward(&q, &k, &v, Some(&table))? })
            }
            (1, [o]) => join(&residual, o.forward(&input)?, Some(&self.mlp_norm)),
            (2, [gate, up]) => {
                let input = fused::silu_times(gate.forward(&input)?, &up.forward(&input)?)?;
                Ok(Carry { residual, input })
            }
            (3, [down]) => join(&residual, down.forward(&input)?, None),
            _ => unreachable!("a layer has the four groups that its decoder named"),
        }
    }

    fn weight(&self, group: usize, member: usize) -> &Tensor {
        self.groups[group][member].weight()
    }

    fn set_weight(&mut self, group: usize, member: usize, weight: Tensor) -> candle_core::Result<()> {
        self.groups[group][member].set_weight(weight)
    }

    fn bias(&self, group: usize, member: usize) -> Option<&Tensor> {
        self.groups[group][member].bias.as_ref()
    }

    fn set_bias(&mut self, group: usize, member: usize, bias: Tensor) {
        if let Some(place) = &mut self.groups[group][member].bias {
            *place = bias;
        }
    }

    fn anatomy(&self, tokens: usize) -> Result<Anatomy, ModelError> {
        let Attention { heads, kv_heads, head_dim, window } = self.attention;
        let head_norms = match &self.qk_norm {
            Some((q, k)) => Some([HeadNorm::of(q)?, HeadNorm::of(k)?]),
            None => None,
        };
        Ok(Anatomy {
            heads,
            kv_heads,
            head_dim,
            window,
            rotation: Some(Rotation::of(&self.rope, tokens)?),
            head_norms,
            activation: Activation::GatedSilu,
            biases: anatomy::biases(&self.groups)?,
        })
    }

    fn share(&self) -> Box<dyn DecoderLayer> {
        Box::new(self.clone())
    }
}

struct PreNormHead {
    norm: Norm,
    weight: Tensor,
}

impl Head for PreNormHead {
    fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.norm.forward(hidden)?.matmul(&self.weight.t()?)?)
    }
}

/// The windows of a config that has `use_sliding_window`: layers from `max_window_layers` on, or those that `layer_types` names.
pub(super) fn optional_windows(config: &Config<'_>) -> Result<Vec<Option<usize>>, ModelError> {
    let layers = config.layers()?;
    if !config.flag("use_sliding_window", false)? {
        return Ok(vec![None; layers]);
    }
    let window = config.dimension("sliding_window")?;
    let Some(kinds) = config.get("layer_types") else {
        let first = config.dimension_if_any("max_window_layers")?.unwrap_or(28);
        return Ok((0..layers).map(|layer| (layer >= first).then_some(window)).collect());
    };
    let kinds = kinds.as_array().filter(|kinds| kinds.len() == layers);
    let kinds = kinds.ok_or_else(|| config.refuse("layer_types", format!("is not a list of {layers} kinds")))?;
    let window_of = |kind: &serde_json::Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => Ok(Some(window)),
        _ => Err(config.refuse("layer_types", format!("{kind} is neither full_attention nor sliding_attention"))),
    };
    kinds.iter().map(window_of).collect()
}
