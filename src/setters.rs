//! Setters for structs of options.

/// Defines a setter for each field of a struct of options. The setter has the name of the field,
/// takes the struct and returns it. After a type with `, optional`, the field is an `Option` of it, and
/// the setter takes either.
macro_rules! setters {
    ($($field:ident: $type:ty $(, $optional:tt)?;)*) => {
        $(setters!(@one $field: $type $(, $optional)?);)*
    };
    (@one $field:ident: $type:ty) => {
        #[doc = concat!("Sets [`", stringify!($field), "`](Self#structfield.", stringify!($field), ").")]
        #[must_use]
        pub fn $field(mut self, $field: $type) -> Self {
            self.$field = $field;
            self
        }
    };
    (@one $field:ident: $type:ty, optional) => {
        #[doc = concat!("Sets [`", stringify!($field), "`](Self#structfield.", stringify!($field), ").")]
        #[must_use]
        pub fn $field(mut self, $field: impl Into<Option<$type>>) -> Self {
            self.$field = $field.into();
            self
        }
    };
}
