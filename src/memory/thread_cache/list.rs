//! Lists of records, linked through the records themselves: last in, first out.

use super::record::{Home, Record};

/// A list of records, each in no other list.
pub(crate) type List<H> = Option<Record<H>>;

/// Takes the record out that was put in last.
#[inline]
pub(crate) fn pop<H: Home>(list: &mut List<H>) -> Option<Record<H>> {
    let next = list.as_mut()?.next.take();
    std::mem::replace(list, next)
}

/// Puts a record in, which is in no other list.
#[inline]
pub(crate) fn push<H: Home>(list: &mut List<H>, mut record: Record<H>) {
    std::mem::swap(&mut record.next, list);
    // What is replaced is the record's own `next` of before: none, so that there is nothing to drop.
    std::mem::forget(list.replace(record));
}

/// The records from the last to the first.
#[inline]
pub(crate) fn reversed<H: Home>(mut list: List<H>) -> List<H> {
    let mut reversed = list.take_if(|first| first.next.is_none());
    while let Some(record) = pop(&mut list) {
        push(&mut reversed, record);
    }
    reversed
}

/// Drops records one after another: a long list would drop them in as deep a recursion.
pub(crate) fn drop_all<H: Home>(mut list: List<H>) {
    while let Some(record) = pop(&mut list) {
        drop(record);
    }
}
