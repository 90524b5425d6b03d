//! From a share of parameters to heads and channels, layer by layer, so that what comes out loads.

use espalier_common::job::{Allocation, Layout};
use espalier_common::pattern::Pattern;
use espalier_common::structure::{AttentionUnit, LayerStructure, Pair, Structure};

/// What a job asks of a structured method.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Asked {
    /// Share of the layers' parameters to remove.
    pub share: f64,
    /// How it is spread over layers.
    pub allocation: Allocation,
    /// With `log`, how much more the last layer loses than the first; if the job does not say, as much as there is when the
    /// first loses nothing.
    pub spread: Option<f64>,
    /// What the checkpoint will look like.
    pub layout: Layout,
    /// Channels that stay are a multiple of this, if the job says.
    pub round_to: Option<usize>,
    /// KV heads to remove from each layer, if the job says.
    pub kv_heads: Option<usize>,
    /// What goes of attention at a time.
    pub unit: AttentionUnit,
    /// Devices that what stays can be split over.
    pub tensor_parallel: usize,
}

/// Channels that stay are a multiple of this unless the job says otherwise: what kernels are made for.
const USUAL_MULTIPLE: usize = 8;

/// Why a share cannot be removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WidthError {
    /// Stock loaders would refuse the shape.
    #[error(
        "removing {remove} of {blocks} KV heads a layer leaves {key} = {value}, which does not divide {of_key} = {of}, so \
         transformers would refuse the model: remove {nearest} with [pattern] kv_heads, or use [output] layout = \"masked\""
    )]
    WouldNotLoad {
        /// KV heads to be removed.
        remove: usize,
        /// KV heads there are.
        blocks: usize,
        /// Key of the config.
        key: String,
        /// What it would be.
        value: usize,
        /// Key that it must divide.
        of_key: String,
        /// Its value.
        of: usize,
        /// The nearest numbers that load.
        nearest: String,
    },
    /// No head would be left.
    #[error("[pattern] kv_heads = {remove} removes every KV head of a layer, which has {blocks}")]
    AllHeads {
        /// KV heads to be removed.
        remove: usize,
        /// KV heads there are.
        blocks: usize,
    },
    /// More than the whole budget.
    #[error(
        "[pattern] kv_heads = {remove} removes {removed} parameters of layer {layer}, but sparsity = {share} asks for {asked}: \
         remove {most} at most, or raise the sparsity"
    )]
    HeadsExceedShare {
        /// KV heads to be removed.
        remove: usize,
        /// The layer.
        layer: usize,
        /// Parameters that go with them.
        removed: usize,
        /// The share of parameters, as the job has it.
        share: String,
        /// Parameters that it asks for.
        asked: usize,
        /// The most KV heads that keep the share to within one.
        most: usize,
    },
    /// Heads that the method or the family does not cut.
    #[error("[pattern] kv_heads = {remove}, but attention heads cannot be removed from this model by this method")]
    NoHeads {
        /// KV heads to be removed.
        remove: usize,
    },
    /// There are not that many channels.
    #[error(
        "layer {layer} cannot lose {asked} of its {parameters} parameters: with {heads} KV heads fewer its channels have {most}"
    )]
    TooMuch {
        /// The layer.
        layer: usize,
        /// Parameters to remove.
        asked: usize,
        /// Parameters of the layer.
        parameters: usize,
        /// KV heads removed.
        heads: usize,
        /// Parameters that could be removed.
        most: usize,
    },
    /// Layers of one width cannot lose different shares.
    #[error(
        "[pattern] allocation = \"log\" gives layers different widths, which layout = \"uniform\" cannot hold: use \"padded\""
    )]
    Uneven,
    /// What is measured of weights says nothing of heads and channels.
    #[error(
        "[pattern] allocation = \"owl\" and \"measured\" are for methods that place zeros: use \"uniform\" or \"log\""
    )]
    Surveyed,
    /// Widths that the layout or the devices cannot have.
    #[error("[pattern] round_to = {round_to} leaves widths that {why} cannot take: the nearest is {nearest}")]
    RoundTo {
        /// What the job says.
        round_to: usize,
        /// Who asks for more.
        why: String,
        /// A multiple that suits all.
        nearest: usize,
    },
    /// Attention that cannot be split over the devices.
    #[error(
        "{key} = {value} cannot be split over [output] tensor_parallel = {devices} devices: {nearest}, or use another number of \
         devices"
    )]
    WouldNotSplit {
        /// Key of the config.
        key: String,
        /// What it would be.
        value: usize,
        /// Devices.
        devices: usize,
        /// What can.
        nearest: String,
    },
    /// What is removed leaves no shape that a runtime knows.
    #[error(
        "what is removed here (attention = \"channels\", or layers of other widths) leaves no shape that runtimes load: use \
         [output] layout = \"masked\""
    )]
    OnlyMasked,
    /// A model that is not of LLaMA's kind.
    #[error("layout = \"nemotron-nas\" is for LLaMA's kind without biases, which this model is not: use \"padded\"")]
    NotUneven,
    /// KV heads where something else goes.
    #[error("[pattern] kv_heads = {remove} needs attention = \"kv-heads\"")]
    OtherUnit {
        /// KV heads to be removed.
        remove: usize,
    },
    /// A job that asks for what its method does not do.
    #[error("{key} is for methods that remove heads and channels, which this one does not")]
    NotStructured {
        /// The job's key.
        key: &'static str,
    },
}

/// What each layer loses, as [`Pattern::Blocks`].
///
/// Heads come first: the whole KV heads that the layer's share comes to, or as many fewer as it takes for the model to load.
/// Channels make up the rest of the budget, and what rounding leaves over goes on to the next layer, unless all layers must
/// be alike.
///
/// # Errors
/// See [`WidthError`].
pub fn widths(structure: &Structure, asked: &Asked) -> Result<Vec<Pattern>, WidthError> {
    if asked.allocation.needs_survey() {
        return Err(WidthError::Surveyed);
    }
    if asked.layout == Layout::Uniform && asked.allocation != Allocation::Uniform {
        return Err(WidthError::Uneven);
    }
    if asked.layout != Layout::Masked && structure.only_masks() {
        return Err(WidthError::OnlyMasked);
    }
    if let Some(remove) = asked.kv_heads.filter(|_| asked.unit != AttentionUnit::KvHeads) {
        return Err(WidthError::OtherUnit { remove });
    }
    let multiple = multiple(structure, asked)?;
    check_heads_that_stay(structure, asked)?;
    let shares = match asked.allocation {
        Allocation::Uniform | Allocation::Owl | Allocation::Measured => vec![asked.share; structure.layers.len()],
        Allocation::Log => {
            let layers = structure.layers.len();
            log_shares(layers, asked.share, first_share(layers, asked.share, asked.spread))
        }
    };
    // Layers that need not be alike make up for each other's rounding.
    let carries = asked.allocation != Allocation::Uniform || asked.layout == Layout::NemotronNas;
    let mut carried = 0.0;
    structure
        .layers
        .iter()
        .zip(shares)
        .enumerate()
        .map(|(index, (layer, share))| {
            let budget = share * layer.parameters as f64 + carried;
            let (attention, removed) = match (&layer.attention, asked.kv_heads) {
                (Some(pair), kv_heads) => {
                    let heads = heads_to_remove(pair, share, kv_heads, asked)?;
                    let removed = heads * pair.parameters;
                    // The share is met to within one head.
                    if kv_heads.is_some() && removed as f64 >= budget + pair.parameters as f64 {
                        return Err(WidthError::HeadsExceedShare {
                            remove: heads,
                            layer: index,
                            removed,
                            share: share.to_string(),
                            asked: budget.round() as usize,
                            most: (budget / pair.parameters as f64).ceil() as usize,
                        });
                    }
                    (heads, removed)
                }
                (None, Some(remove)) if remove > 0 => return Err(WidthError::NoHeads { remove }),
                (None, _) => (0, 0),
            };
            let channels = channels_to_remove(index, layer, budget, (attention, removed), multiple)?;
            if carries {
                carried = budget - (removed + channels * layer.channels.parameters) as f64;
            }
            Ok(Pattern::Blocks { attention, channels })
        })
        .collect()
}

/// What the number of channels that stay must be a multiple of.
fn multiple(structure: &Structure, asked: &Asked) -> Result<usize, WidthError> {
    let devices = if asked.layout == Layout::Masked { 1 } else { asked.tensor_parallel };
    let mut needed = (devices, format!("[output] tensor_parallel = {devices}"));
    if asked.layout == Layout::NemotronNas {
        let uneven = structure.uneven.as_ref().ok_or(WidthError::NotUneven)?;
        needed = (least_common(uneven.multiple, devices), "layout = \"nemotron-nas\"".to_owned());
    }
    let (needed, why) = needed;
    match asked.round_to {
        Some(round_to) if round_to.is_multiple_of(needed) => Ok(round_to),
        Some(round_to) => Err(WidthError::RoundTo { round_to, why, nearest: least_common(round_to, needed) }),
        None => Ok(least_common(USUAL_MULTIPLE, needed)),
    }
}

/// Attention that stays must be as easy to share as what is cut.
fn check_heads_that_stay(structure: &Structure, asked: &Asked) -> Result<(), WidthError> {
    let devices = asked.tensor_parallel;
    let stays = structure.layers.iter().any(|layer| layer.attention.is_none());
    match structure.heads {
        Some(heads) if stays && asked.layout != Layout::Masked && !heads.split_over(devices) => {
            Err(WidthError::WouldNotSplit {
                key: "num_attention_heads".to_owned(),
                value: heads.query,
                devices,
                nearest: format!("with {} KV heads they stay as they are", heads.kv),
            })
        }
        _ => Ok(()),
    }
}

fn least_common(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

fn heads_to_remove(pair: &Pair, share: f64, kv_heads: Option<usize>, asked: &Asked) -> Result<usize, WidthError> {
    let blocks = pair.blocks;
    let masked = asked.layout == Layout::Masked;
    let devices = if masked { 1 } else { asked.tensor_parallel };
    let loads = |remove: &usize| {
        let stay = blocks.saturating_sub(*remove);
        pair.splits_into(stay) && (masked || (pair.loads_with(stay) && pair.splits_over(stay, devices)))
    };
    let nearest_to = |remove: usize| {
        let below = (0..remove.min(blocks)).rev().find(loads);
        let above = (remove + 1..blocks).find(loads);
        let removals: Vec<String> = below.iter().chain(&above).map(usize::to_string).collect();
        removals.join(" or ")
    };
    let would_not_split = |remove: usize| {
        let (key, per_block) =
            pair.config.iter().rev().max_by_key(|(_, count)| **count).map_or(("", 1), |(k, c)| (k, *c));
        let nearest = match nearest_to(remove) {
            none if none.is_empty() => "no number of heads can".to_owned(),
            removals => format!("remove {removals} of {blocks} with [pattern] kv_heads"),
        };
        WidthError::WouldNotSplit { key: key.to_owned(), value: (blocks - remove) * per_block, devices, nearest }
    };
    let Some(remove) = kv_heads else {
        // Removing no head always loads, or the dense model would not either. The sum is off by rounding at whole heads.
        let whole = (share * blocks as f64 + 1e-9).floor() as usize;
        return match (0..=whole).rev().find(loads) {
            Some(remove) => Ok(remove),
            None if !pair.splits_over(blocks, devices) => Err(would_not_split(0)),
            None => Ok(0),
        };
    };
    match &pair.divides {
        _ if remove >= blocks => Err(WidthError::AllHeads { remove, blocks }),
        _ if loads(&remove) => Ok(remove),
        Some(rule) if !pair.loads_with(blocks - remove) => Err(WidthError::WouldNotLoad {
            remove,
            blocks,
            key: rule.key.clone(),
            value: (blocks - remove) * rule.per_block,
            of_key: rule.of_key.clone(),
            of: rule.of,
            nearest: nearest_to(remove),
        }),
        _ => Err(would_not_split(remove)),
    }
}

fn channels_to_remove(
    index: usize,
    layer: &LayerStructure,
    budget: f64,
    (heads, removed): (usize, usize),
    multiple: usize,
) -> Result<usize, WidthError> {
    let Pair { blocks, parameters, .. } = layer.channels;
    let wanted = (budget - removed as f64) / parameters as f64;
    if wanted < 0.5 {
        return Ok(0);
    }
    let stay = blocks as f64 - wanted;
    let rounded = (stay / multiple as f64).round() * multiple as f64;
    // No multiple fits between what stays and the dense width: the dense width it is.
    let stay = if rounded >= blocks as f64 { blocks } else { rounded.max(0.0) as usize };
    if stay == 0 || wanted >= blocks as f64 {
        return Err(WidthError::TooMuch {
            layer: index,
            asked: budget.round() as usize,
            parameters: layer.parameters,
            heads,
            most: removed + blocks.saturating_sub(multiple) * parameters,
        });
    }
    Ok(blocks - stay)
}

/// `ln(n!)/(n·ln n)`: the mean of SlimGPT's logarithm, which goes from 0 to 1.
fn log_mean(layers: usize) -> f64 {
    let n = layers as f64;
    (1..=layers).map(|i| (i as f64).ln()).sum::<f64>() / (n * n.ln())
}

/// r_0 for a `spread` of `r_{n−1} − r_0` around a mean of `share`; never below 0.
fn first_share(layers: usize, share: f64, spread: Option<f64>) -> f64 {
    spread.filter(|_| layers > 1).map_or(0.0, |spread| (share - spread * log_mean(layers)).max(0.0))
}

/// `r_i = r_0 + (r_{n−1} − r_0)·ln(i+1)/ln n`, the last so that the mean is `share`: `r_{n−1} = r_0 + (share − r_0)/c_n` with
/// `c_n = ln(n!)/(n·ln n)`.
///
/// Source: SlimGPT (arXiv 2412.18110), eq. 6, as quoted in ALGORITHMS.md §5; its r_0 is not known.
pub fn log_shares(layers: usize, share: f64, first: f64) -> Vec<f64> {
    if layers < 2 {
        return vec![share; layers];
    }
    let n = layers as f64;
    let last = first + (share - first) / log_mean(layers);
    (1..=layers).map(|i| first + (last - first) * (i as f64).ln() / n.ln()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use espalier_common::structure::{Divides, HeadCounts, Uneven};

    use super::*;

    fn pair(blocks: usize, block: usize, parameters: usize) -> Pair {
        Pair {
            consumer: String::new(),
            blocks,
            block,
            stride: 1,
            runs: 1,
            parameters,
            fits_bias: false,
            slices: Vec::new(),
            config: BTreeMap::new(),
            divides: None,
        }
    }

    /// SmolLM2-135M: 9 heads in 3 groups of width 64, 576 wide, 1536 channels.
    fn smollm2(layers: usize) -> Structure {
        llama(layers, 3, 3, 576, 1536)
    }

    fn llama(layers: usize, kv_heads: usize, queries: usize, hidden: usize, channels: usize) -> Structure {
        let width = hidden / (kv_heads * queries);
        let per_head = 2 * hidden * width * (queries + 1);
        let rule =
            Divides { key: "num_attention_heads".into(), per_block: queries, of_key: "hidden_size".into(), of: hidden };
        let config = [("num_attention_heads".to_owned(), queries), ("num_key_value_heads".to_owned(), 1)].into();
        let attention = Pair { divides: Some(rule), config, ..pair(kv_heads, queries * width, per_head) };
        let layer = LayerStructure {
            parameters: kv_heads * per_head + channels * 3 * hidden,
            attention: Some(attention),
            channels: pair(channels, 1, 3 * hidden),
        };
        let uneven = Some(Uneven { hidden, multiple: 256 });
        Structure { explicit: BTreeMap::new(), layers: vec![layer; layers], uneven, only_masks: false, heads: None }
    }

    fn asked(share: f64) -> Asked {
        Asked {
            share,
            allocation: Allocation::Uniform,
            spread: None,
            layout: Layout::Uniform,
            round_to: Some(1),
            kv_heads: None,
            unit: AttentionUnit::KvHeads,
            tensor_parallel: 1,
        }
    }

    fn removed(structure: &Structure, patterns: &[Pattern]) -> usize {
        let of = |(layer, pattern): (&LayerStructure, &Pattern)| match *pattern {
            Pattern::Blocks { attention, channels } => {
                attention * layer.attention.as_ref().map_or(0, |pair| pair.parameters)
                    + channels * layer.channels.parameters
            }
            _ => panic!("{pattern}"),
        };
        structure.layers.iter().zip(patterns).map(of).sum()
    }

    #[test]
    fn the_share_is_met_within_one_channel_a_layer() {
        let structure = smollm2(4);
        for share in [0.0, 0.05, 0.2, 0.3, 0.5, 0.7] {
            let patterns = widths(&structure, &asked(share)).unwrap();
            let target = share * structure.layers[0].parameters as f64;
            let off = removed(&structure, &patterns[..1]) as f64 - target;
            assert!(off.abs() <= 0.5 * 1728.0 + 1.0, "{share}: off by {off}");
        }
        assert_eq!(widths(&structure, &asked(0.0)).unwrap()[0], Pattern::Blocks { attention: 0, channels: 0 });
    }

    #[test]
    fn heads_go_whole_and_channels_carry_the_rest() {
        let patterns = widths(&smollm2(1), &asked(0.5)).unwrap();
        assert_eq!(patterns, [Pattern::Blocks { attention: 1, channels: 853 }]);
        let patterns = widths(&smollm2(1), &asked(0.2)).unwrap();
        assert_eq!(patterns, [Pattern::Blocks { attention: 0, channels: 410 }]);
    }

    #[test]
    fn channels_that_stay_are_a_multiple_of_what_was_asked() {
        let patterns = widths(&smollm2(1), &Asked { round_to: Some(64), ..asked(0.5) }).unwrap();
        assert_eq!(patterns, [Pattern::Blocks { attention: 1, channels: 832 }]);
    }

    #[test]
    fn heads_that_would_not_load_are_left_or_refused_by_name() {
        // 8 groups of 4 heads, 4096 wide: 28 and 24 heads do not divide it, 16 do.
        let structure = llama(1, 8, 4, 4096, 14336);
        let patterns = widths(&structure, &asked(0.3)).unwrap();
        assert!(matches!(patterns[0], Pattern::Blocks { attention: 0, .. }), "{patterns:?}");
        let error = widths(&structure, &Asked { kv_heads: Some(2), ..asked(0.3) }).unwrap_err().to_string();
        assert!(error.contains("num_attention_heads = 24") && error.contains("remove 0 or 4"), "{error}");
        let masked = Asked { kv_heads: Some(2), layout: Layout::Masked, ..asked(0.3) };
        assert!(matches!(widths(&structure, &masked).unwrap()[0], Pattern::Blocks { attention: 2, .. }));
        let error = widths(&structure, &Asked { kv_heads: Some(8), ..asked(0.3) }).unwrap_err();
        assert_eq!(error, WidthError::AllHeads { remove: 8, blocks: 8 });
    }

    #[test]
    fn what_devices_cannot_share_is_refused_with_what_they_can() {
        // 8 groups of 4 heads: 4 devices can share 8 or 4 groups, and copies of 2 or 1.
        let structure = llama(1, 8, 4, 4096, 14336);
        let split = |devices| Asked { tensor_parallel: devices, ..asked(0.5) };
        assert_eq!(
            widths(&structure, &split(3)),
            Err(WidthError::RoundTo { round_to: 1, why: "[output] tensor_parallel = 3".into(), nearest: 3 })
        );
        let three = Asked { round_to: None, ..split(3) };
        assert!(matches!(widths(&structure, &three), Err(WidthError::WouldNotSplit { value: 32, devices: 3, .. })));
        let patterns = widths(&structure, &Asked { round_to: None, ..split(4) }).unwrap();
        let Pattern::Blocks { attention: 4, channels } = patterns[0] else { panic!("{patterns:?}") };
        assert!((14336 - channels).is_multiple_of(8));
        let masked = Asked { layout: Layout::Masked, ..split(3) };
        assert!(widths(&structure, &masked).is_ok());
        // Two devices cannot share three groups of three heads, but two groups they can.
        let small = Asked { round_to: None, share: 0.2, ..split(2) };
        let refused = widths(&smollm2(1), &small).unwrap_err().to_string();
        assert!(refused.contains("num_attention_heads = 9") && refused.contains("remove 1 of 3"), "{refused}");
        assert!(widths(&smollm2(1), &Asked { share: 0.5, ..small }).is_ok());
    }

    #[test]
    fn uneven_layers_keep_a_multiple_that_loaders_compute_and_meet_the_share_together() {
        let structure = llama(12, 8, 4, 4096, 14336);
        let nas = Asked { layout: Layout::NemotronNas, round_to: None, ..asked(0.3) };
        let patterns = widths(&structure, &nas).unwrap();
        for pattern in &patterns {
            let Pattern::Blocks { channels, .. } = pattern else { panic!("{pattern}") };
            assert!((14336 - channels).is_multiple_of(256));
        }
        let target = 0.3 * 12.0 * structure.layers[0].parameters as f64;
        assert!((removed(&structure, &patterns) as f64 - target).abs() <= 128.0 * 3.0 * 4096.0);
        let error = widths(&structure, &Asked { round_to: Some(96), ..nas }).unwrap_err();
        assert!(matches!(error, WidthError::RoundTo { round_to: 96, nearest: 768, .. }), "{error}");
        let mut other = structure;
        other.uneven = None;
        assert_eq!(widths(&other, &nas), Err(WidthError::NotUneven));
    }

    #[test]
    fn runs_lose_alike_and_interleaved_blocks_are_only_masked() {
        let mut structure = smollm2(1);
        let attention = structure.layers[0].attention.as_mut().unwrap();
        *attention = Pair { blocks: 9, block: 64, runs: 3, parameters: 2 * 576 * 64, ..attention.clone() };
        attention.divides.as_mut().unwrap().per_block = 1;
        let queries = Asked { unit: AttentionUnit::QueryHeads, ..asked(0.4) };
        let patterns = widths(&structure, &queries).unwrap();
        assert!(matches!(patterns[0], Pattern::Blocks { attention: 0 | 3, .. }), "{patterns:?}");
        assert_eq!(
            widths(&structure, &Asked { kv_heads: Some(1), ..queries }),
            Err(WidthError::OtherUnit { remove: 1 })
        );
        let attention = structure.layers[0].attention.as_mut().unwrap();
        *attention = Pair { blocks: 192, block: 3, stride: 64, divides: None, ..attention.clone() };
        let channels = Asked { unit: AttentionUnit::Channels, ..queries };
        assert_eq!(widths(&structure, &channels), Err(WidthError::OnlyMasked));
        let patterns = widths(&structure, &Asked { layout: Layout::Masked, ..channels }).unwrap();
        assert!(matches!(patterns[0], Pattern::Blocks { attention: 75, .. }), "{patterns:?}");
    }

    #[test]
    fn heads_that_take_more_than_the_share_are_refused() {
        let two = Asked { kv_heads: Some(2), ..asked(0.1) };
        // A head has 294912 of the layer's 3538944 parameters; the share is met to within one.
        assert!(widths(&smollm2(1), &two).is_ok());
        let three = Asked { kv_heads: Some(2), ..asked(0.05) };
        let refused = widths(&smollm2(1), &three).unwrap_err().to_string();
        assert!(refused.contains("sparsity = 0.05 asks for 176947: remove 1 at most"), "{refused}");
    }

    #[test]
    fn attention_that_stays_is_shared_too() {
        let mut structure = smollm2(1);
        structure.layers[0].attention = None;
        structure.heads = Some(HeadCounts { query: 9, kv: 3 });
        let over = |devices, layout| {
            widths(&structure, &Asked { tensor_parallel: devices, layout, round_to: None, ..asked(0.2) })
        };
        assert!(matches!(over(2, Layout::Uniform), Err(WidthError::WouldNotSplit { value: 9, devices: 2, .. })));
        assert!(over(3, Layout::Uniform).is_ok() && over(2, Layout::Masked).is_ok());
    }

    #[test]
    fn more_than_there_is_cannot_be_removed() {
        let mut structure = smollm2(1);
        structure.layers[0].attention = None;
        assert!(matches!(widths(&structure, &asked(0.9)), Err(WidthError::TooMuch { layer: 0, .. })));
    }

    #[test]
    fn log_shares_have_the_mean_that_was_asked() {
        let shares = log_shares(32, 0.5, 0.0);
        assert!((shares[31] - 0.680).abs() < 5e-4 && shares[0].abs() < 1e-12, "{}", shares[31]);
        assert!((shares.iter().sum::<f64>() / 32.0 - 0.5).abs() < 1e-12);
        assert!((log_shares(32, 0.2, 0.0)[31] - 0.272).abs() < 5e-4);
        assert!(log_shares(7, 0.3, 0.1).is_sorted());
        let shares = log_shares(32, 0.5, first_share(32, 0.5, Some(0.3)));
        assert!((shares[31] - shares[0] - 0.3).abs() < 1e-9 && shares[0] > 0.2);
        assert!((shares.iter().sum::<f64>() / 32.0 - 0.5).abs() < 1e-9);
        assert!(first_share(32, 0.1, Some(0.9)).abs() < 1e-12, "no layer grows");
    }

    #[test]
    fn the_log_allocation_meets_the_share_over_the_whole_model() {
        let structure = smollm2(30);
        let log = Asked { allocation: Allocation::Log, layout: Layout::Padded, ..asked(0.5) };
        let patterns = widths(&structure, &log).unwrap();
        let target = 0.5 * 30.0 * structure.layers[0].parameters as f64;
        assert!((removed(&structure, &patterns) as f64 - target).abs() <= 1728.0);
        assert_eq!(widths(&structure, &Asked { layout: Layout::Uniform, ..log }), Err(WidthError::Uneven));
    }
}
