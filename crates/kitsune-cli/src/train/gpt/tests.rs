//! A resumed run is bit-identical to an uninterrupted one, including skipped steps.

use kitsune::amp::{AmpConfig, ScalerState};
use kitsune::optim::{AdamW, AdamWConfig, Optimizer};
use kitsune::{Device, HostConfig};

use super::*;

/// Batches per step.
const BATCHES: usize = 2;

/// The saved state of a run.
struct Snapshot {
    weights: Vec<Vec<f32>>,
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
    steps: Vec<u32>,
    scaler: ScalerState,
    random: Random,
}

struct Training {
    task: GptTask,
    optimizer: AdamW,
    scaler: GradScaler,
}

impl Training {
    fn new(dtype: DType) -> Self {
        let device = Device::host(HostConfig::default()).unwrap();
        let context = Context::new(&device).unwrap();
        let text = Text::load(None).unwrap();
        let task = GptTask::new(&context, dtype, text, Some(2), 4).unwrap();
        let optimizer = AdamW::new(task.parameters(), AdamWConfig::default()).unwrap();
        let config = AmpConfig {
            growth_interval: 2,
            ..AmpConfig::default()
        };
        let scaler = GradScaler::new(&context, config).unwrap();
        Self {
            task,
            optimizer,
            scaler,
        }
    }

    /// One step, which overflows if `spoil`. Returns the bits of its losses.
    fn step(&mut self, spoil: bool) -> Vec<u32> {
        let share = Tensor::full(&self.task.context, [], DType::F32, 0.5).unwrap();
        let losses = (0..BATCHES).map(|_| {
            let pass = self.task.pass(&self.scaler, Some(&share)).unwrap();
            pass.loss.value().item::<f32>().unwrap().to_bits()
        });
        let losses = losses.collect();
        if spoil {
            let grad = self.optimizer.parameters()[3].grad().unwrap();
            grad.narrow(0, 0, 1).unwrap().fill(f64::NAN).unwrap();
        }
        self.scaler.clip_grad_norm(&self.optimizer, 1.0).unwrap();
        let outcome = self.scaler.step(&mut self.optimizer).unwrap();
        assert_eq!(outcome.is_applied().unwrap(), !spoil);
        self.scaler.update().unwrap();
        self.optimizer.zero_grad();
        losses
    }

    fn each<'a>(&'a self, get: impl Fn(usize) -> &'a Tensor) -> Vec<Vec<f32>> {
        let indices = 0..self.optimizer.parameters().len();
        indices.map(|index| get(index).to_vec().unwrap()).collect()
    }

    fn save(&self) -> Snapshot {
        let optimizer = &self.optimizer;
        Snapshot {
            weights: self.each(|index| optimizer.parameters()[index].value()),
            first: self.each(|index| optimizer.first_moment(index).unwrap()),
            second: self.each(|index| optimizer.second_moment(index).unwrap()),
            steps: optimizer.step_counts().to_vec().unwrap(),
            scaler: self.scaler.state_dict().unwrap(),
            random: self.task.random.clone(),
        }
    }

    fn load(&mut self, saved: &Snapshot) {
        let optimizer = &self.optimizer;
        for (index, parameter) in optimizer.parameters().iter().enumerate() {
            for (tensor, values) in [
                (parameter.value(), &saved.weights[index]),
                (optimizer.first_moment(index).unwrap(), &saved.first[index]),
                (
                    optimizer.second_moment(index).unwrap(),
                    &saved.second[index],
                ),
            ] {
                tensor.copy_from_slice(values).unwrap();
            }
        }
        let steps = optimizer.step_counts();
        steps.copy_from_slice(&saved.steps).unwrap();
        self.scaler.load_state_dict(&saved.scaler).unwrap();
        self.task.random = saved.random.clone();
    }
}

fn bits(values: &[Vec<f32>]) -> Vec<u32> {
    values
        .iter()
        .flatten()
        .map(|value| value.to_bits())
        .collect()
}

#[test]
fn taken_up_again_it_goes_on_to_the_bit() {
    for dtype in [DType::F16, DType::Bf16, DType::F32] {
        // A skip before the stop, one as the first step after it, and growth of the scale on both sides.
        let spoiled = [false, true, false, false, true, false, false, false];
        let (before, after) = spoiled.split_at(4);
        let mut through = Training::new(dtype);
        before.iter().for_each(|spoil| drop(through.step(*spoil)));
        let saved = through.save();
        let expected: Vec<_> = after.iter().map(|spoil| through.step(*spoil)).collect();

        let mut again = Training::new(dtype);
        again.load(&saved);
        let got: Vec<_> = after.iter().map(|spoil| again.step(*spoil)).collect();
        assert_eq!(got, expected, "{dtype}");
        let (through, again) = (through.save(), again.save());
        assert_ne!(bits(&saved.weights), bits(&through.weights));
        assert_eq!(bits(&again.weights), bits(&through.weights), "{dtype}");
        assert_eq!(bits(&again.second), bits(&through.second), "{dtype}");
        assert_eq!(again.steps, through.steps);
        assert_eq!(again.scaler, through.scaler);
    }
}
