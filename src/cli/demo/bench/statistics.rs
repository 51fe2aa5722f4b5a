//! Numbers from measured times: outages out of acknowledgements, and distributions out of outages. Pure.
//!
//! The rule that would surprise: an outage is the longest time between two acknowledgements, not the time from the fault on. A planned
//! stop lets clients write for a while after it was ordered, and that is no outage.

use std::time::Duration;

use serde::Serialize;

use crate::clock::BootTime;

/// A distribution of times, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// How many were measured.
    pub count: usize,
    /// The shortest.
    pub min_s: f64,
    /// Half were not longer. Of an even number the mean of the middle two.
    pub median_s: f64,
    /// 95 of 100 were not longer, by nearest rank: with fewer than 20 this is the longest.
    pub p95_s: f64,
    /// The longest.
    pub max_s: f64,
}

/// The distribution of `times`; None when nothing was measured.
pub fn summary(times: &[Duration]) -> Option<Summary> {
    let Spread { count, min, median, p95, max } = spread(times.iter().map(Duration::as_secs_f64).collect())?;
    Some(Summary { count, min_s: min, median_s: median, p95_s: p95, max_s: max })
}

/// A distribution of whatever numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// How many were measured.
    pub count: usize,
    /// The least.
    pub min: f64,
    /// Half were not more. Of an even number the mean of the middle two.
    pub median: f64,
    /// 95 of 100 were not more, by nearest rank.
    pub p95: f64,
    /// The most.
    pub max: f64,
}

/// The distribution of `values`; None when there are none.
pub fn spread(mut values: Vec<f64>) -> Option<Spread> {
    values.sort_by(f64::total_cmp);
    let count = values.len();
    let (min, max) = (*values.first()?, *values.last()?);
    let middle = count / 2;
    let median = if count.is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] };
    let rank = (count * 95).div_ceil(100);
    Some(Spread { count, min, median, p95: values[rank - 1], max })
}

/// The longest time without an acknowledgement that ends after `fault`. The last acknowledgement before the fault has to be among
/// `acknowledged`, in whatever order; None when none came after the fault.
pub fn outage(acknowledged: &[BootTime], fault: BootTime) -> Option<Duration> {
    let mut times = acknowledged.to_vec();
    times.sort();
    times.windows(2).filter(|pair| pair[1] > fault).map(|pair| pair[1].since(pair[0])).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(list: &[u64]) -> Vec<Duration> {
        list.iter().map(|seconds| Duration::from_secs(*seconds)).collect()
    }

    #[test]
    fn a_summary_is_the_same_in_whatever_order_the_times_come() {
        let expected = Summary { count: 4, min_s: 1.0, median_s: 3.0, p95_s: 9.0, max_s: 9.0 };
        assert_eq!(summary(&seconds(&[9, 1, 2, 4])), Some(expected));
        assert_eq!(summary(&seconds(&[4, 2, 9, 1])), Some(expected));
    }

    #[test]
    fn the_median_of_an_odd_number_is_the_one_in_the_middle() {
        assert_eq!(summary(&seconds(&[5, 1, 100])).unwrap().median_s, 5.0);
        assert_eq!(summary(&seconds(&[7])).unwrap(), Summary { count: 1, min_s: 7.0, median_s: 7.0, p95_s: 7.0, max_s: 7.0 });
    }

    #[test]
    fn one_in_twenty_may_be_longer_than_the_95th_percentile() {
        let times: Vec<u64> = (1..=20).collect();
        assert_eq!(summary(&seconds(&times)).unwrap().p95_s, 19.0);
    }

    #[test]
    fn nothing_measured_has_no_summary() {
        assert_eq!(summary(&[]), None);
    }

    #[test]
    fn an_outage_is_the_longest_gap_that_ends_after_the_fault() {
        let at = |list: &[u64]| list.iter().map(|seconds| BootTime(seconds * 1_000_000_000)).collect::<Vec<_>>();
        let fault = BootTime(10_500_000_000);
        let seen = |list: &[u64]| outage(&at(list), fault).map(|gap| gap.as_secs());
        assert_eq!(seen(&[0, 9, 10, 13, 14]), Some(3), "the gap of 9 s was before the fault");
        assert_eq!(seen(&[10, 11, 12, 16, 17]), Some(4), "writes went on for a while after the order");
        assert_eq!(seen(&[16, 17, 10, 12]), Some(4), "in whatever order they come");
        assert_eq!(seen(&[9, 10]), None, "no acknowledgement after the fault is no outage of zero");
    }
}
