//! Samples and what is reported of them.

/// Measured values of one thing, in the order they came.
#[derive(Clone, Debug, Default)]
pub struct Samples(Vec<u64>);

impl Samples {
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    pub fn push(&mut self, value: u64) {
        self.0.push(value);
    }

    pub fn extend(&mut self, more: &Self) {
        self.0.extend_from_slice(&more.0);
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What it takes when nothing else is going on: on a busy host the most telling of all.
    pub fn min(&self) -> u64 {
        self.0.iter().copied().min().unwrap_or(0)
    }

    pub fn p50(&self) -> u64 {
        self.percentile(50)
    }

    /// With fewer than 100 samples this is the largest.
    pub fn p99(&self) -> u64 {
        self.percentile(99)
    }

    /// Nearest rank: the smallest value that at least `percent` of all are not above. A measured
    /// value, never one in between. 0 where there are none.
    fn percentile(&self, percent: usize) -> u64 {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(0)
    }
}

impl FromIterator<u64> for Samples {
    fn from_iter<I: IntoIterator<Item = u64>>(values: I) -> Self {
        Self(values.into_iter().collect())
    }
}

/// One row a stage, in the order in which stages first appeared.
#[derive(Clone, Debug, Default)]
pub struct Stages(Vec<(String, Samples)>);

impl Stages {
    pub fn push(&mut self, name: &str, nanoseconds: u64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, samples)) => samples.push(nanoseconds),
            None => self.0.push((name.to_owned(), Samples::from_iter([nanoseconds]))),
        }
    }

    pub fn extend(&mut self, more: &Self) {
        for (name, samples) in more.iter() {
            samples.0.iter().for_each(|&nanoseconds| self.push(name, nanoseconds));
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Samples)> {
        self.0.iter().map(|(name, samples)| (name.as_str(), samples))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let samples: Samples = (1..=200).rev().collect();
        assert_eq!((samples.p50(), samples.p99()), (100, 198));
        let few: Samples = [30, 10, 20].into_iter().collect();
        assert_eq!((few.min(), few.p50(), few.p99()), (10, 20, 30));
        assert_eq!(Samples::from_iter([7]).p50(), 7);
        assert_eq!(Samples::default().p99(), 0);
    }

    #[test]
    fn stages_keep_their_order_and_collect() {
        let mut stages = Stages::default();
        for (name, ns) in [("create", 3), ("map", 1), ("create", 5)] {
            stages.push(name, ns);
        }
        let seen: Vec<_> = stages.iter().map(|(n, s)| (n, s.count(), s.p99())).collect();
        assert_eq!(seen, [("create", 2, 5), ("map", 1, 1)]);
    }
}
