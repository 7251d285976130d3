//! Lists of records, linked through the records themselves: last in, first out.

use super::record::{Home, Record};

/// A list of records. A record is in at most one list.
pub(crate) type List<H> = Option<Record<H>>;

/// Removes the record that was pushed last.
#[inline]
pub(crate) fn pop<H: Home>(list: &mut List<H>) -> Option<Record<H>> {
    let next = list.as_mut()?.next.take();
    std::mem::replace(list, next)
}

/// Adds a record that is in no list.
#[inline]
pub(crate) fn push<H: Home>(list: &mut List<H>, mut record: Record<H>) {
    std::mem::swap(&mut record.next, list);
    // After the swap, `list` is the record's former `next`, which is `None`: forgetting it skips a drop that would do
    // nothing.
    std::mem::forget(list.replace(record));
}

/// The same records in reverse order.
#[inline]
pub(crate) fn reversed<H: Home>(mut list: List<H>) -> List<H> {
    let mut reversed = list.take_if(|first| first.next.is_none());
    while let Some(record) = pop(&mut list) {
        push(&mut reversed, record);
    }
    reversed
}

/// Drops records one by one. Dropping a long list itself would recurse once per record.
pub(crate) fn drop_all<H: Home>(mut list: List<H>) {
    while let Some(record) = pop(&mut list) {
        drop(record);
    }
}
