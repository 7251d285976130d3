//! Totals by name, which outlive the pools and scalers that counted them.
//!
//! A recorder of the `metrics` facade never forgets a series, and its counters keep the largest value they are given.
//! A program that makes a pool or scaler anew for each fold or epoch would therefore see the counters of the largest
//! one only, and the gauges of the last one for ever. So the ledger adds up what is published under each name: counters
//! over all holders of the name, gone ones too; gauges over those that live. A *holder* is a pool or scaler that was
//! published.
//!
//! Invariants: an exported counter never falls. What is kept of holders that are gone is one sum for each series, not
//! one for each holder. Must not know: where numbers come from.

use std::any::Any;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Weak;

use metrics::{Label, counter, gauge};
use parking_lot::Mutex;

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger {
    names: BTreeMap::new(),
});

/// Names one holder and tells whether it is gone. While this exists, no other holder gets the same address.
pub(super) type Token = Weak<dyn Any + Send + Sync>;

/// The series of one holder: readings by labels.
pub(super) type Rows = BTreeMap<Vec<Label>, Vec<Reading>>;

/// Name and value of a metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Reading {
    pub(super) name: &'static str,
    pub(super) number: Number,
}

/// A value, and how the values of several holders become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    /// A total: the sum over all holders, gone or not.
    Counter(u64),
    /// A quantity: the sum over living holders.
    Amount(f64),
    /// A ratio, a factor or a state: the largest of the living holders.
    Level(f64),
}

/// What is published under one name: its kind (pools and scalers may share names), and the labels that all its series
/// have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) kind: Kind,
    pub(super) labels: Vec<Label>,
}

/// What has names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Pool,
    Scaler,
    Fp8,
}

/// Everything that was published.
#[derive(Debug)]
struct Ledger {
    names: BTreeMap<Name, Holders>,
}

/// All that a name has been given to.
#[derive(Debug, Default)]
struct Holders {
    living: Vec<Holder>,
    /// Sums of the counters of gone holders; gauges are 0.
    gone: Rows,
}

/// One pool or scaler, as it was last published.
#[derive(Debug)]
struct Holder {
    token: Token,
    rows: Rows,
}

/// Takes `rows` as the present values of the holder of `token` under `name`, then does what [`sweep`] does.
pub(super) fn publish(name: Name, token: Token, rows: Rows) {
    let mut ledger = LEDGER.lock();
    ledger.names.entry(name).or_default().note(token, rows);
    ledger.sweep();
}

/// Exports the totals of every name, after dropping holders that are gone.
pub(super) fn sweep() {
    LEDGER.lock().sweep();
}

impl Ledger {
    /// Exports every name each time: the facade does not tell whether the recorder is a new one, which knows nothing yet.
    fn sweep(&mut self) {
        for holders in self.names.values_mut() {
            holders.fold_gone();
            export(&holders.totals());
        }
    }
}

impl Holders {
    fn note(&mut self, token: Token, rows: Rows) {
        let mut living = self.living.iter_mut();
        match living.find(|holder| holder.token.ptr_eq(&token)) {
            Some(holder) => holder.update(rows),
            None => self.living.push(Holder { token, rows }),
        }
    }

    /// Adds the counters of holders that are gone to the sums and forgets these holders.
    fn fold_gone(&mut self) {
        let is_gone = |holder: &mut Holder| holder.token.strong_count() == 0;
        for holder in self.living.extract_if(.., is_gone) {
            for (labels, row) in holder.rows {
                let sums = self.gone.entry(labels).or_insert_with(|| emptied(&row));
                add_counters(sums, &row);
            }
        }
    }

    /// What is exported of the name.
    fn totals(&self) -> Rows {
        let mut totals = Rows::new();
        for (labels, row) in self.living.iter().flat_map(|holder| &holder.rows) {
            match totals.entry(labels.clone()) {
                Entry::Vacant(entry) => drop(entry.insert(row.clone())),
                Entry::Occupied(entry) => join(entry.into_mut(), row),
            }
        }
        for (labels, row) in &self.gone {
            match totals.entry(labels.clone()) {
                Entry::Vacant(entry) => drop(entry.insert(row.clone())),
                Entry::Occupied(entry) => add_counters(entry.into_mut(), row),
            }
        }
        totals
    }
}

impl Holder {
    /// Takes new values. Counters do not fall: of two threads that publish one holder, the one that read it first may
    /// come last.
    fn update(&mut self, rows: Rows) {
        let before = std::mem::replace(&mut self.rows, rows);
        for (labels, row) in before {
            let now = self.rows.entry(labels).or_insert_with(|| emptied(&row));
            for (now, before) in now.iter_mut().zip(&row) {
                if let (Number::Counter(now), Number::Counter(before)) =
                    (&mut now.number, before.number)
                {
                    *now = before.max(*now);
                }
            }
        }
    }
}

/// `row` with nothing counted and all gauges at 0.
fn emptied(row: &[Reading]) -> Vec<Reading> {
    let emptied = |number| match number {
        Number::Counter(_) => Number::Counter(0),
        Number::Amount(_) => Number::Amount(0.0),
        Number::Level(_) => Number::Level(0.0),
    };
    let row = row.iter().map(|reading| Reading {
        number: emptied(reading.number),
        ..*reading
    });
    row.collect()
}

/// Adds the counters of `row` to those of `sums`.
fn add_counters(sums: &mut [Reading], row: &[Reading]) {
    for (sum, reading) in sums.iter_mut().zip(row) {
        if let (Number::Counter(sum), Number::Counter(more)) = (&mut sum.number, reading.number) {
            *sum = sum.saturating_add(more);
        }
    }
}

/// Makes `sums` the values of two living holders.
fn join(sums: &mut [Reading], row: &[Reading]) {
    add_counters(sums, row);
    for (sum, reading) in sums.iter_mut().zip(row) {
        match (&mut sum.number, reading.number) {
            (Number::Amount(sum), Number::Amount(more)) => *sum += more,
            (Number::Level(most), Number::Level(other)) => *most = most.max(other),
            _ => {}
        }
    }
}

fn export(rows: &Rows) {
    for (labels, row) in rows {
        for Reading { name, number } in row {
            match *number {
                Number::Counter(total) => counter!(*name, labels.iter()).absolute(total),
                Number::Amount(value) | Number::Level(value) => {
                    gauge!(*name, labels.iter()).set(value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn rows(allocations: u64, bytes: f64) -> Rows {
        let reading = |name, number| Reading { name, number };
        let row = vec![
            reading("allocations", Number::Counter(allocations)),
            reading("bytes", Number::Amount(bytes)),
            reading("ratio", Number::Level(bytes / 100.0)),
        ];
        Rows::from([(vec![Label::new("pool", "x")], row)])
    }

    fn token() -> Arc<dyn Any + Send + Sync> {
        Arc::new(())
    }

    #[test]
    fn a_thousand_holders_leave_one_row() {
        let mut holders = Holders::default();
        for _ in 0..1000 {
            let holder = token();
            holders.note(Arc::downgrade(&holder), rows(1, 5.0));
            holders.note(Arc::downgrade(&holder), rows(3, 7.0));
            holders.fold_gone();
            assert_eq!(holders.living.len(), 1);
            drop(holder);
        }
        holders.fold_gone();
        assert_eq!((holders.living.len(), holders.gone.len()), (0, 1));
        assert_eq!(holders.totals(), rows(3000, 0.0));
    }

    #[test]
    fn holders_of_one_name_add_up_in_any_order() {
        let (first, second) = (token(), token());
        let publish = |order: [(&Arc<_>, Rows); 2]| {
            let mut holders = Holders::default();
            for (holder, rows) in order {
                holders.note(Arc::downgrade(holder), rows);
            }
            holders.totals()
        };
        let of_first = || (&first, rows(4, 60.0));
        let of_second = || (&second, rows(5, 20.0));
        let totals = publish([of_first(), of_second()]);
        assert_eq!(totals, publish([of_second(), of_first()]));
        let values = totals.into_values().flatten();
        let values: Vec<_> = values.map(|reading| reading.number).collect();
        let sums = [Number::Counter(9), Number::Amount(80.0), Number::Level(0.6)];
        assert_eq!(values, sums);
    }

    #[test]
    fn the_counter_of_a_holder_does_not_fall() {
        let (mut holders, holder) = (Holders::default(), token());
        for (allocations, bytes) in [(8, 4.0), (6, 2.0)] {
            holders.note(Arc::downgrade(&holder), rows(allocations, bytes));
        }
        assert_eq!(holders.totals(), rows(8, 2.0));
        // Nor where a row is missing.
        holders.note(Arc::downgrade(&holder), Rows::new());
        assert_eq!(holders.totals(), rows(8, 0.0));
    }
}
