template <typename T>
static void decoder_layer(const LayerArgs&) {}
